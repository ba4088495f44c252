"""The private optimizer clips as the plan says, whichever engine brings the gradients."""

from __future__ import annotations

import functools
from typing import Any, NoReturn

import torch
from opacus.optimizers import AdaClipDPOptimizer, DPOptimizer, DPPerLayerOptimizer
from opacus.optimizers.optimizer import _check_processed_flag, _mark_as_processed

from dpfix.errors import ArgumentError
from dpfix.instrument.clipping import Scheme, together
from dpfix.training.own_clipping import OwnClipping, refuse_scheme

_KNOWN = (DPOptimizer, AdaClipDPOptimizer, DPPerLayerOptimizer)
"""Classes of Opacus's whose clipping the plan says; one of the script's own may clip otherwise."""


def clips_by_plan(cls: type[Any]) -> bool:
    """Whether an optimizer class clips as Opacus's do; one of the script's own may do it otherwise."""
    return any(cls.clip_and_accumulate is known.clip_and_accumulate for known in _KNOWN)


@functools.cache
def clipping_class(cls: type[Any]) -> type[Any]:
    """The subclass of an optimizer of Opacus's, which has a ``guard``, that clips as the plan says.

    One number says how much: ``max_grad_norm``, by which a sample moves the sum at most, and which the noise is a multiple of.
    Groups of parameters have fixed shares of it, so that whoever changes it, as a scheduler does, changes theirs with it.
    In Opacus a scheduler lowers the noise of ``DPPerLayerOptimizer`` and leaves the clip norms, and with them the sensitivity.

    Returns:
        The subclass.
    """

    class Clipping(cls):
        by_scheme = clips_by_plan(cls)

        @property
        def max_grad_norms(self) -> list[float]:
            return self.guard.plan.clipping.clip_norms(float(self.max_grad_norm))

        @max_grad_norms.setter
        def max_grad_norms(self, norms: Any) -> NoReturn:
            raise ArgumentError(
                "the clip norms of single groups of parameters cannot be changed while training:",
                "the noise is a multiple of max_grad_norm, which they have fixed shares of.",
                "Set optimizer.max_grad_norm, which scales them all.",
                path="max_grad_norms",
            )

        def count(self, norms: torch.Tensor | None) -> None:
            """The engine has clipped samples of these norms."""

        def clip_and_accumulate(self) -> None:
            guarded = self.guard.guarded
            scheme = guarded.plan.clipping
            if not self.by_scheme:
                self.__dict__.setdefault("own_clipping", OwnClipping()).clip(self, super().clip_and_accumulate)
                return
            if scheme.plain:
                super().clip_and_accumulate()
                return
            of = {id(p): name for name, p in guarded.parameters.items()}
            names = [of[id(p)] for p in self.params]
            gradients = [self._get_flat_grad_sample(p).to(p.dtype) for p in self.params]
            sums = scheme.clipped_sums(names, gradients, float(self.max_grad_norm))
            for p, total in zip(self.params, sums, strict=True):
                _check_processed_flag(p.grad_sample)
                p.summed_grad = total if p.summed_grad is None else p.summed_grad + total
                _mark_as_processed(p.grad_sample)

    return Clipping


def way_to_clip(optimizer: Any) -> str | None:
    """How a private optimizer clips, in words that hold whatever the clip norm; ``None`` for another optimizer."""
    guard = getattr(optimizer, "__dict__", {}).get("guard")
    return None if guard is None else guard.guarded.plan.clipping.words()


def settle(optimizer: Any, scheme: Scheme) -> None:
    """The clip norm of all parameters of an optimizer that Opacus has made, where it rounds it to single precision.

    Args:
        optimizer: it has to clip as the plan says.
        scheme: how that is.
    """
    refuse_scheme(optimizer, scheme, clips_by_plan(type(optimizer)))
    norms = vars(optimizer).pop("max_grad_norms", None)
    if norms is not None:
        optimizer.max_grad_norm = together(norms)

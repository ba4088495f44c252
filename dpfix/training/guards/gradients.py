"""Gradients come from the engine, are released as they came, and are finite."""

from __future__ import annotations

import math

import torch
from opacus.optimizers import DPOptimizer
from typing_extensions import override

from dpfix.engines import engine_of
from dpfix.errors import NonFiniteGradientError, PlanBrokenError
from dpfix.instrument.grad_watch import GradWatch
from dpfix.instrument.source import warn_user
from dpfix.training.guards.check import Check, Guarded


class ThroughTheEngine(Check):
    """No gradient reaches a trained parameter past the engine, where the engine keeps them all to itself.

    Catches: penalties on weights in the loss, and parts of the model called directly, whose gradient cannot be clipped per
    sample. Costs: a look at a list.

    Args:
        guarded: the training.
        watch: knows what autograd accumulated; :class:`UneditedGradients` looks after it.
    """

    def __init__(self, guarded: Guarded, watch: GradWatch) -> None:
        self._name = guarded.name
        self._watch = watch
        self._owned = engine_of(guarded.plan).owns_gradients

    @override
    def before_step(self, optimizer: DPOptimizer) -> None:
        if self._owned and self._watch.arrived:
            name = self._watch.arrived[0]
            raise PlanBrokenError(
                f"gradient reached parameter `{name}` of {self._name} past the model's forward: by a penalty on weights in "
                "the loss, or a part of the model called directly.",
                "It cannot be clipped per sample.",
                "Use weight_decay for penalties, and call the model as a whole.",
                path=name,
            )


class UneditedGradients(Check):
    """``p.grad`` is what autograd made of it; warns otherwise.

    Catches: ``clip_grad_norm_`` and edits by hand, which the release ignores. Costs: a look at every ``p.grad``, twice.

    Args:
        watch: knows what autograd accumulated.
    """

    def __init__(self, watch: GradWatch) -> None:
        self._watch = watch

    @override
    def cleared(self) -> None:
        self._watch.reset()

    @override
    def before_step(self, optimizer: DPOptimizer) -> None:
        if edited := self._watch.edited():
            warn_user(
                f"p.grad of `{edited[0]}` was changed between backward() and step() ({len(edited)} parameter(s)), for "
                "example by clip_grad_norm_. The private optimizer releases the clipped sum of per-sample gradients "
                "and ignores p.grad; change max_grad_norm, or edit p.grad in a hook after the noise."
            )

    @override
    def detach(self) -> None:
        self._watch.remove()


class FiniteSum(Check):
    """The clipped sum is finite before noise is added; if not, the gradients are dropped.

    Catches: parameters that become NaN for good, with noise drawn in vain. Costs: a sum over the samples' norms where the
    engine has clipped, otherwise one pass over the clipped sum.
    """

    def __init__(self, guarded: Guarded) -> None:
        self._guarded = guarded

    @override
    def summed(self, norms: torch.Tensor | None) -> None:
        if norms is not None and math.isfinite(sum(norms.tolist())):
            return  # a sum of finitely many finite gradients: no need to read it again
        parameters = self._guarded.parameters
        sums = {n: p.summed_grad.detach() for n, p in parameters.items() if p.summed_grad is not None}  # type: ignore[attr-defined]
        totals = [total.sum() for total in sums.values()]
        if not totals or math.isfinite(torch.stack([t.to(totals[0].device) for t in totals]).sum()):
            return
        bad = [n for n, s in sums.items() if not bool(torch.isfinite(s).all())]
        if not bad:
            return  # finite sums whose own sum is too large for the check
        self._guarded.forget_sum()
        self._guarded.handle.finish()
        raise NonFiniteGradientError(
            f"the clipped sum of parameter `{bad[0]}` of {self._guarded.name} is not finite ({len(bad)} parameter(s)).",
            "No parameter was moved and no noise was drawn.",
            "Lower the learning rate, look for divisions by zero and logarithms in the loss, or use float32 instead of "
            "autocast.",
            path=bad[0],
        )

"""One real step, up to ``backward()``, as it is going to be looked at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch

from dpfix.instrument import pytree
from dpfix.layout.rows import Rows
from dpfix.training.follow.calls import ModelCall, Output, inner_nodes
from dpfix.training.follow.delivery import Delivery, Exchange

if TYPE_CHECKING:
    from dpfix.training.follow.placement import Placement

TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-3}
"""Relative difference that is rounding, by type; what is not here is less precise."""
ROUGH = 5e-2


class NotFollowedError(Exception):
    """A step cannot be repeated; the text says why. Caught where the checks are made."""


class DecidesError(NotFollowedError):
    """With other samples the script would have taken another way."""


@dataclass(frozen=True)
class RealStep:
    """A real step at the moment of ``backward()``.

    Attributes:
        loss: the tensor on which ``backward`` was called.
        outer: the gradient that was given to ``backward``, or ``None``.
        calls: the calls of the model whose outputs are in the loss.
        samples: number of samples in each of them.
        gradients: for every call the gradients of the loss with respect to its outputs, each for itself; ``None`` for one that
            other outputs are made of, or that the script has written into: autograd cannot be asked for it without going
            through the model.
        deliveries: the delivered batches that the calls work on.
        place: where ``backward`` was called.
    """

    loss: torch.Tensor
    outer: torch.Tensor | None
    calls: tuple[ModelCall, ...]
    samples: int
    gradients: tuple[tuple[torch.Tensor | None, ...], ...]
    deliveries: tuple[Delivery, ...]
    place: str

    @cached_property
    def telling(self) -> tuple[int, ...]:
        """The samples whose outputs the loss feels most and least; fewer where they are the same or cannot be told."""
        squares = torch.zeros(self.samples, dtype=torch.float64)
        for call, gradients in zip(self.calls, self.gradients, strict=True):
            for output, gradient in zip(call.outputs, gradients, strict=True):
                if output.dim is not None and gradient is not None and not gradient.is_complex():
                    rows = Rows.of(output.dim, self.samples).split(gradient).flatten(1).double()
                    squares += torch.nan_to_num(rows).square().sum(1).cpu()
        return tuple(dict.fromkeys((int(squares.argmax()), int(squares.argmin()))))

    def completed(self, base: Repeated) -> RealStep:
        """The same with gradients that autograd could not be asked for, taken from a repetition that is otherwise equal."""
        pairs = zip(self.gradients, base.gradients, strict=True)
        filled = tuple(
            tuple(b if a is None else a for a, b in zip(mine, others, strict=True)) for mine, others in pairs
        )
        return replace(self, gradients=filled)

    @classmethod
    def of(
        cls,
        loss: torch.Tensor,
        outer: torch.Tensor | None,
        calls: list[ModelCall],
        place: str,
        paused: Callable[[], AbstractContextManager[None]],
    ) -> RealStep:
        """Take the gradients with respect to the outputs; the graph stays.

        Returns:
            The step.

        Raises:
            NotFollowedError: the calls do not hold the same samples in a known layout.
        """
        inner = inner_nodes([output.edge.node for call in calls for output in call.outputs])
        asked = [o for call in calls for o in call.outputs if o.edge.node not in inner and not _overwritten(o)]
        with paused():
            edges = [output.edge for output in asked]  # through what was written into, autograd may find no way
            found = (
                torch.autograd.grad(_scalar(loss, outer), edges, retain_graph=True, allow_unused=True) if asked else ()
            )
        got = dict(zip(map(id, asked), found, strict=True))
        gradients = {call: [got.get(id(output)) for output in call.outputs] for call in calls}
        unknown = {id(o) for call in calls for o in call.outputs if id(o) not in got}
        used = [
            c for c in calls if any(g is not None for g in gradients[c]) or any(id(o) in unknown for o in c.outputs)
        ]
        if not used:
            raise NotFollowedError("the loss does not depend on the model's outputs")
        for call in used:
            if call.layout is None:
                raise NotFollowedError("a call of the model has a form that the probe did not show")
            for output, gradient in zip(call.outputs, gradients[call], strict=True):
                if gradient is not None and output.dim is None and output.tensor.dim():
                    raise NotFollowedError("an output of the model does not show which rows belong to which sample")
                if output.dim is not None and output.dim.counts:
                    raise NotFollowedError("samples have different numbers of rows")
        filled = tuple(
            tuple(_filled(o, g, known=id(o) not in unknown) for o, g in zip(c.outputs, gradients[c], strict=True))
            for c in used
        )
        samples = {call.samples for call in used}
        if len(samples) != 1:
            raise NotFollowedError("calls of the model in one step hold different numbers of samples")
        deliveries = tuple(dict.fromkeys(d for call in used for d in call.deliveries))
        return cls(loss, outer, tuple(used), samples.pop(), filled, deliveries, place)


def _overwritten(output: Output) -> bool:
    return output.tensor._version != output.version


def _filled(output: Output, gradient: torch.Tensor | None, *, known: bool) -> torch.Tensor | None:
    if gradient is not None:
        return gradient.detach()
    return torch.zeros_like(output.tensor) if known else None


def _scalar(loss: torch.Tensor, outer: torch.Tensor | None) -> torch.Tensor:
    return loss.sum() if outer is None else (loss * outer).sum()


@dataclass(frozen=True)
class Repeated:
    """A step that was repeated with other samples.

    Attributes:
        arguments: ``(args, kwargs)`` of every call of the model.
        gradients: for every call the gradients of the loss with respect to its outputs.
        placement: where the samples are, if they are not where the loader had them.
    """

    arguments: list[Any]
    gradients: list[list[torch.Tensor]]
    placement: Placement | None = None


class Way(Protocol):
    """A way to repeat a step."""

    def repeat(self, exchange: Exchange | None) -> Repeated:
        """Repeat the step.

        Args:
            exchange: which samples take the places of others; ``None`` repeats the very step.

        Returns:
            Arguments and gradients.

        Raises:
            NotFollowedError: it cannot be repeated with these samples.
        """
        ...


def tensors_of(arguments: Any) -> list[tuple[pytree.Path, torch.Tensor]]:
    """The tensors of a call's arguments with their paths."""
    return [(path, leaf) for path, leaf in pytree.leaves(arguments) if isinstance(leaf, torch.Tensor)]


def other_shapes(step: RealStep, arguments: Sequence[Any]) -> bool:
    """Whether arguments of the model have other shapes than those of the step: the batch was cut to another length."""
    pairs = zip(step.calls, arguments, strict=False)
    return any(
        [t.shape for _, t in tensors_of((call.args, call.kwargs))] != [t.shape for _, t in tensors_of(other)]
        for call, other in pairs
    )


def close(a: torch.Tensor, b: torch.Tensor, closeness: float | None = None) -> bool:
    """Whether two tensors are equal up to rounding, which is that of their type if not told; NaN equals NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if torch.equal(a, b):
        return True
    if not (a.is_floating_point() or a.is_complex()):
        return False
    closeness = closeness or TOLERANCE.get(a.dtype, ROUGH)
    finite = b[torch.isfinite(b)]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    return torch.allclose(a, b, rtol=closeness, atol=1e-30 + closeness * largest, equal_nan=True)

"""One call of a layer: its forward without its parameters' graph, and a backward that only returns the input gradient.

The weight gradient of the batch, which private training has no use for, is never computed by autograd. What the call
needs for per-sample gradients is bound to the call itself: there is no stack that a repeated, detached or
out-of-order call could put into the wrong order, and a call whose gradient never comes never reports.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dpfix.engines.bookkeeping.contributions import Contribution, Kept, Part
from dpfix.engines.functional.call import without_fallback_warnings
from dpfix.layout.rows import Rows

Report = Callable[[nn.Parameter, Contribution], None]
"""Takes a parameter and what a call adds to its per-sample gradient."""


@dataclass(frozen=True, eq=False)
class LayerCall:
    """What a rule needs to know about a call.

    Attributes:
        module: the layer, for its settings.
        rows: where the samples are in the layer's input (and, for its dimension, its output).
        reporter: where contributions go.
        weight: the weight of this call: a parameter, some rows of one, or computed from parameters by a parametrisation.
        bias: the same for the bias.
        sources: the parameters that a computed weight or bias is made of.
    """

    module: Any
    rows: Rows
    reporter: Report
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    sources: tuple[nn.Parameter, ...] = ()

    def trains(self, name: str) -> bool:
        """Whether the per-sample gradient of a parameter is wanted."""
        value = self._value(name)
        return value is not None and value.requires_grad

    def report(self, name: str, contribution: Contribution) -> None:
        """Say what this call adds to the per-sample gradient of a parameter.

        Args:
            name: ``weight``, ``bias`` or another one of :attr:`LayerRule.parameters`.
            contribution: the contribution; :class:`Kept` takes the per-sample gradients themselves.
        """
        value: Any = self._value(name)
        if isinstance(value, nn.Parameter):
            self.reporter(value, contribution)
            return
        base = value._base
        if isinstance(base, nn.Parameter) and value.shape[1:] == base.shape[1:] and value.stride() == base.stride():
            first = (value.storage_offset() - base.storage_offset()) // base.stride(0)
            self.reporter(base, Part(contribution, first, first + len(value), base.shape))
            return
        for parameter, gradients in pulled_back(value, self.sources, contribution.per_sample()):
            self.reporter(parameter, Kept(gradients))

    def _value(self, name: str) -> torch.Tensor | None:
        return getattr(self, name) if name in ("weight", "bias") else getattr(self.module, name)


def pulled_back(
    value: torch.Tensor, sources: tuple[nn.Parameter, ...], gradients: torch.Tensor
) -> list[tuple[nn.Parameter, torch.Tensor]]:
    """Per-sample gradients of what a weight was computed from (a weight or spectral normalisation).

    Args:
        value: the computed weight, with its graph.
        sources: parameters it may depend on.
        gradients: per-sample gradients of the weight, shape ``[samples, *weight]``.

    Returns:
        The parameters that it depends on, with their per-sample gradients.
    """
    with without_fallback_warnings():
        found = torch.autograd.grad(
            value, sources, gradients.to(value.dtype), retain_graph=True, allow_unused=True, is_grads_batched=True
        )
    return [(p, g) for p, g in zip(sources, found, strict=True) if g is not None]


class LayerRule(ABC):
    """How one family of layers with one input and one output is computed and accounted for.

    Attributes:
        features: how many trailing dimensions of the input are features; the samples may be in any other one.
            ``None``: rows in dimension 0, channels in dimension 1.
        parameters: names of the parameters that :meth:`backward` reports. A module that trains others is not computed by
            the rule.
    """

    features: int | None = None
    parameters: tuple[str, ...] = ("weight", "bias")

    @abstractmethod
    def accepts(self, module: nn.Module) -> bool:
        """Whether the rule computes exactly what this module does.

        Args:
            module: a module that owns trainable parameters.

        Returns:
            Whether it does.
        """

    def prepare(self, module: Any, x: torch.Tensor) -> torch.Tensor:
        """What happens to the input before anything with a parameter does (padding); under autograd."""
        return x

    def finish(self, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """What happens to the output of :meth:`forward` at the end; under autograd."""
        return output

    @abstractmethod
    def forward(self, call: LayerCall, x: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]:
        """The layer's output, without a graph. It must be no view.

        Args:
            x: the prepared input.

        Returns:
            The output, and what :meth:`backward` needs.
        """

    @abstractmethod
    def backward(
        self, call: LayerCall, saved: tuple[torch.Tensor, ...], g: torch.Tensor, wanted: bool
    ) -> torch.Tensor | None:
        """Report the parameters' contributions and return the gradient of the input.

        Args:
            saved: what :meth:`forward` kept.
            g: gradient of the output.
            wanted: whether the input's gradient is needed.

        Returns:
            The gradient of the prepared input, or ``None``.
        """


class Recorded(torch.autograd.Function):
    """A layer call in the graph. The anchor makes the output require gradient when the input does not."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, anchor: torch.Tensor, rule: LayerRule, call: LayerCall) -> torch.Tensor:  # noqa: D102
        output, saved = rule.forward(call, x)
        ctx.save_for_backward(*saved)
        ctx.rule, ctx.call = rule, call
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> Any:  # noqa: D102
        # What is kept for the step must not hold on to the graph that led here.
        saved = tuple(t if t is None or t.grad_fn is None else t.detach() for t in ctx.saved_tensors)
        gradient = ctx.rule.backward(ctx.call, saved, g if g.grad_fn is None else g.detach(), ctx.needs_input_grad[0])
        return gradient, None, None, None


def plainly(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether a module is of some kind and computes what that kind does: a subclass may have another forward."""
    return any(isinstance(module, kind) and type(module).forward is kind.forward for kind in kinds)


def autocast(x: torch.Tensor, *parameters: torch.Tensor | None) -> tuple[Any, ...]:
    """What autocast would make of the operands of a matrix product.

    Args:
        *parameters: weight and bias.

    Returns:
        The operands in autocast's dtype, or as they are where it is off.
    """
    kind = x.device.type
    operands = (x, *parameters)
    if not torch.is_autocast_enabled(kind):
        return operands
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t.to(dtype) if t is not None and t.dtype == torch.float32 else t for t in operands)

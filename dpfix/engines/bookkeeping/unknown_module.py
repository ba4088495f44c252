"""Modules with parameters of their own that no rule knows: one sample at a time under ``vmap``.

The module's own parameters get a leading sample dimension, so that the script's own backward pass leaves per-sample
gradients on them; layers inside that a rule knows step out of ``vmap`` and stay on the fast path.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from dpfix.engines.bookkeeping.contributions import Kept
from dpfix.engines.bookkeeping.forward import ReplacedForward
from dpfix.engines.bookkeeping.handle import BookkeepingHandle
from dpfix.engines.bookkeeping.iteration import RootCall
from dpfix.engines.bookkeeping.layer_rule import Report
from dpfix.engines.functional.call import MappedCall
from dpfix.engines.functional.parameter_swap import parameter_slots


class Expand(torch.autograd.Function):
    """A parameter, once per sample; its gradient is the per-sample gradient."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, anchor: torch.Tensor, boxed: tuple[nn.Parameter], samples: int, report: Report
    ) -> torch.Tensor:
        (parameter,) = boxed  # in a box, so that the graph does not lead to the parameter itself
        ctx.parameter, ctx.report = parameter, report
        return parameter.detach().expand(samples, *parameter.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> Any:  # noqa: D102
        ctx.report(ctx.parameter, Kept(g))
        return None, None, None, None


class UnknownModuleForward(ReplacedForward):
    """For a module that no rule knows.

    Args:
        parameters: the parameters to expand: its own, and those inside that no call of their own accounts for.
    """

    def __init__(
        self, handle: BookkeepingHandle, module: nn.Module, path: str, parameters: Mapping[str, nn.Parameter]
    ) -> None:
        super().__init__(handle, module, path)
        self.parameters = dict(parameters)
        slots = parameter_slots(module, self.parameters)
        self._mapped = MappedCall(self.original, slots, workarounds=handle.plan.help_vmap)

    @override
    def inside(self, call: RootCall, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Another module has already put this one's parameters in.
        return self.original(*args, **kwargs)

    @override
    def recorded(self, call: RootCall, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        layout = self.handle.layout(self.path, number)
        samples, report = call.samples, call.reporter(call.samples)
        parameters = self.handle.held(self.parameters)
        expanded = {n: Expand.apply(self.handle.anchor, (p,), samples, report) for n, p in parameters.items()}
        weight = self.handle.plan.weight(samples, self.handle.counts())
        with call.mapping():
            return self._mapped(expanded, layout, samples, weight, args, kwargs)

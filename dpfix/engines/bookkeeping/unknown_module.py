"""Modules with parameters of their own that no rule knows: one sample at a time under ``vmap``.

The module's own parameters get a leading sample dimension, so that the script's own backward pass leaves per-sample
gradients on them; layers inside that a rule knows step out of ``vmap`` and stay on the fast path.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dpfix.engines.bookkeeping.contributions import Kept
from dpfix.engines.bookkeeping.forward import ReplacedForward
from dpfix.engines.functional.call import call_mapped
from dpfix.engines.functional.parameter_swap import parameter_slots

if TYPE_CHECKING:
    from dpfix.engines.bookkeeping.handle import BookkeepingHandle
    from dpfix.engines.bookkeeping.iteration import Iteration, RootCall


class Expand(torch.autograd.Function):
    """A parameter, once per sample; its gradient is the per-sample gradient."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, anchor: torch.Tensor, boxed: tuple[nn.Parameter], samples: int, iteration: Iteration
    ) -> torch.Tensor:
        (parameter,) = boxed  # in a box, so that the graph does not lead to the parameter itself
        ctx.parameter, ctx.report = parameter, iteration.reporter(samples)
        return parameter.detach().expand(samples, *parameter.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> Any:  # noqa: D102
        ctx.report(ctx.parameter, Kept(g))
        return None, None, None, None


class UnknownModuleForward(ReplacedForward):
    """For a module that no rule knows.

    Args:
        handle: the engine at work.
        module: the module.
        path: its path.
        parameters: the parameters to expand: its own, and those inside that no call of their own accounts for.
    """

    def __init__(
        self, handle: BookkeepingHandle, module: nn.Module, path: str, parameters: Mapping[str, nn.Parameter]
    ) -> None:
        super().__init__(handle, module, path)
        self.parameters = dict(parameters)
        self.slots = parameter_slots(module, self.parameters)

    def inside(self, call: RootCall, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Within another module under ``vmap``: that one has already expanded the parameters.

        Args:
            call: the model's call.
            args: arguments.
            kwargs: keyword arguments.

        Returns:
            The module's output.
        """
        return self.original(*args, **kwargs)

    def recorded(self, call: RootCall, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module, one sample at a time.

        Args:
            call: the model's call.
            number: how many calls of this module came before in the step.
            args: arguments.
            kwargs: keyword arguments.

        Returns:
            The module's output for the whole batch.
        """
        layout = self.handle.layout(self.path, number)
        anchor, samples = self.handle.anchor, call.samples
        expanded = {n: Expand.apply(anchor, (p,), samples, call.iteration) for n, p in self.parameters.items()}
        with call.mapping():
            return call_mapped(
                self.original, self.slots, expanded, layout.inputs, layout.output, samples,
                self.handle.plan.weight(samples, self.handle.counts()), args, kwargs, helped=self.handle.plan.needs_workarounds,
            )  # fmt: skip

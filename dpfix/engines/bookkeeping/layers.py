"""What stands in for the ``forward`` of a layer while the engine is attached."""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dpfix.engines.bookkeeping import rows
from dpfix.engines.bookkeeping.calls import LayerCall, Recorded, Rule
from dpfix.engines.bookkeeping.rows import Rows
from dpfix.layout import SampleDim

if TYPE_CHECKING:
    from dpfix.engines.bookkeeping.handle import BookkeepingHandle, RootCall


def plain_forward(module: nn.Module | None) -> Any:
    """The ordinary ``forward`` of a module, for copies and pickles of a module that is in private training.

    Args:
        module: the module.

    Returns:
        Its class's ``forward``, bound.
    """
    return None if module is None else MethodType(type(module).forward, module)


class StandIn:
    """Stands in for a module's ``forward``; copies and pickles of the module get its ordinary one back.

    Args:
        handle: the engine at work.
        module: the module.
        path: its path in the model.
    """

    def __init__(self, handle: BookkeepingHandle, module: nn.Module, path: str) -> None:
        self.handle, self.module, self.path = handle, module, path
        self.original = module.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward.

        Args:
            *args: its arguments.
            **kwargs: its keyword arguments.

        Returns:
            Its output.
        """
        number = self.handle.count_call(self.path)
        call = self.handle.present_call() if torch.is_grad_enabled() else None
        if call is None:
            return self.original(*args, **kwargs)
        if torch._C._are_functorch_transforms_active():  # type: ignore[attr-defined]
            return self.inside(call, args, kwargs) if call.inside_vmap else self.original(*args, **kwargs)
        return self.recorded(call, number, args, kwargs)

    def inside(self, call: RootCall, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call from within a module that runs one sample at a time under ``vmap``.

        Args:
            call: the model's call.
            args: arguments.
            kwargs: keyword arguments.

        Returns:
            The module's output.
        """
        raise NotImplementedError

    def recorded(self, call: RootCall, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call whose gradients are to be taken per sample.

        Args:
            call: the model's call.
            number: how many calls of this module came before in the step.
            args: arguments.
            kwargs: keyword arguments.

        Returns:
            The module's output.
        """
        raise NotImplementedError

    def __reduce__(self) -> Any:
        return plain_forward, (self.module,)


class LayerStandIn(StandIn):
    """For a layer that a rule knows.

    Args:
        handle: the engine at work.
        module: the layer.
        path: its path.
        rule: how it is computed and accounted for.
    """

    def __init__(self, handle: BookkeepingHandle, module: nn.Module, path: str, rule: Rule) -> None:
        super().__init__(handle, module, path)
        self.rule = rule

    def recorded(self, call: RootCall, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The layer, recorded.

        Args:
            call: the model's call.
            number: how many calls of this layer came before in the step.
            args: the input.
            kwargs: or the input by keyword.

        Returns:
            The layer's output.
        """
        x = only_input(self.module, args, kwargs)
        layout = next(iter(self.handle.layout(self.path, number).inputs), ((), None))[1]
        return self.run(call, *self._placed(x, layout, call.samples))

    def _placed(self, x: torch.Tensor, layout: SampleDim | None, samples: int) -> tuple[torch.Tensor, Rows]:
        # An input that is the same for all samples (positions) is given to each of them.
        if layout is not None:
            return x, rows.rows_of(x, layout, samples)
        batch = x.shape[0] == 1 if x.dim() > max(1, self.rule.features or 0) else False
        if not batch and self.rule.features is None:
            raise NotImplementedError(f"`{self.path}` is called with a batch that does not depend on the samples")
        whole = x if batch else x.unsqueeze(0)
        return whole.expand(samples, *whole.shape[1:]), Rows(samples)

    def run(self, call: RootCall, x: torch.Tensor, where: Rows) -> torch.Tensor:
        """Record one call of the layer.

        Args:
            call: the model's call.
            x: the input.
            where: where its samples are.

        Returns:
            The output.
        """
        layer = LayerCall(self.module, where, call.iteration.reporter(where.samples))
        output = Recorded.apply(self.rule.prepare(self.module, x), self.handle.anchor, self.rule, layer)
        return self.rule.finish(x, output)

    def inside(self, call: RootCall, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The layer under ``vmap``, where the samples are known to be in the mapped dimension.

        Args:
            call: the model's call.
            args: the input.
            kwargs: or the input by keyword.

        Returns:
            The layer's output.
        """
        return Inside.apply(only_input(self.module, args, kwargs), self, call)


class Inside(torch.autograd.Function):
    """Takes a layer call out of ``vmap``: it is recorded on the whole batch."""

    @staticmethod
    def forward(x: torch.Tensor, stand_in: LayerStandIn, call: RootCall) -> torch.Tensor:  # noqa: D102
        raise NotImplementedError("a layer was called outside of the mapped samples")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: D102
        raise NotImplementedError

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: torch.Tensor, stand_in: LayerStandIn, call: RootCall) -> Any:  # noqa: D102
        samples = info.batch_size
        x = x.unsqueeze(0).expand(samples, *x.shape) if in_dims[0] is None else x.movedim(in_dims[0], 0)
        if stand_in.rule.features is not None:
            return stand_in.run(call, x, Rows(samples)), 0
        output = stand_in.run(call, x.flatten(0, 1), Rows(samples))
        return output.unflatten(0, (samples, -1)), 0


def only_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The one tensor that a layer was called with.

    Args:
        module: the layer.
        args: positional arguments.
        kwargs: keyword arguments.

    Returns:
        The tensor.

    Raises:
        NotImplementedError: there is something else.
    """
    given = [*args, *kwargs.values()]
    if len(given) != 1 or not isinstance(given[0], torch.Tensor):
        raise NotImplementedError(f"{type(module).__name__} was called with more than its input")
    return given[0]

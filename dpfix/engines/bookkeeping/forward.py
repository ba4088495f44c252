"""What stands in for the ``forward`` of a layer while the engine is attached."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from dpfix.engines.bookkeeping.handle import BookkeepingHandle
from dpfix.engines.bookkeeping.iteration import RootCall
from dpfix.engines.bookkeeping.layer_rule import LayerCall, LayerRule, Recorded
from dpfix.engines.functional.workarounds import mapped
from dpfix.engines.replaced import Replaced, transformed
from dpfix.layout import rows
from dpfix.layout.rows import Rows
from dpfix.layout.sample_dim import SampleDim


class ReplacedForward(Replaced, ABC):
    """Stands in for a module's ``forward`` within the model.

    Args:
        path: its path in the model.
    """

    def __init__(self, handle: BookkeepingHandle, module: nn.Module, path: str) -> None:
        super().__init__(module)
        self.handle, self.path = handle, path

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward, recorded where it is called by the model in a training step."""
        number = self.handle.count_call(self.path)
        call = self.handle.present_call() if torch.is_grad_enabled() else None
        if call is None:
            return self.original(*args, **kwargs)
        if transformed():
            return self.inside(call, args, kwargs) if call.inside_vmap else self.original(*args, **kwargs)
        return self.recorded(call, number, args, kwargs)

    @abstractmethod
    def inside(self, call: RootCall, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call from within a module that runs one sample at a time under ``vmap``.

        Returns:
            The module's output for one sample.
        """

    @abstractmethod
    def recorded(self, call: RootCall, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call on the whole batch.

        Args:
            number: how many calls of this module came before in the step.

        Returns:
            The module's output.

        Raises:
            NotImplementedError: there is no batch of samples.
        """

    def input_dim(self, number: int, place: int = 0) -> SampleDim | None:
        """How an input of a call carries its samples.

        Args:
            number: how many calls of this module came before in the step.
            place: the number of the input tensor.

        Returns:
            The layout; ``None`` if it carries none.
        """
        inputs = self.handle.layout(self.path, number).inputs
        return inputs[place][1] if place < len(inputs) else None

    def rules_in(self, call: RootCall) -> Apply:
        """What applies rules in a call of this module."""
        return Apply(call, self.handle.anchor, sources(self.module))


class CompositeForward(ReplacedForward):
    """For a layer that is made of several."""

    @staticmethod
    @abstractmethod
    def accepts(module: nn.Module) -> bool:
        """Whether this computes exactly what a module does."""

    @staticmethod
    def on_the_batch(module: Any, dims: Sequence[SampleDim]) -> bool:
        """Whether inputs whose samples are in some dimensions can be computed as a whole batch."""
        return len({d.dim for d in dims}) == 1


class Apply:
    """Applies rules within one call of a module: on the whole batch, or out of ``vmap``.

    Args:
        anchor: makes outputs require gradient.
        sources: parameters that a computed weight may be made of.
    """

    def __init__(self, call: RootCall, anchor: torch.Tensor, sources: tuple[nn.Parameter, ...] = ()) -> None:
        self.call, self.anchor, self.sources = call, anchor, sources

    def __call__(
        self,
        rule: LayerRule,
        module: Any,
        x: torch.Tensor,
        where: Rows | None = None,
        *,
        weight: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One product, convolution, lookup or normalisation.

        Args:
            rule: how it is computed and accounted for.
            module: its settings.
            where: where the input's samples are; ``None`` under ``vmap``.

        Returns:
            Its output.
        """

        def run(x: torch.Tensor, where: Rows) -> torch.Tensor:
            layer = LayerCall(module, where, self.call.reporter(where.samples), weight, bias, self.sources)
            output = Recorded.apply(rule.prepare(module, x), self.anchor, rule, layer)
            return rule.finish(x, output)

        return run(x, where) if where is not None else OutOfMap.apply(mapped_layer(rule, run), mapped(x))


def mapped_layer(rule: LayerRule, run: Callable[[torch.Tensor, Rows], torch.Tensor]) -> Callable[..., Any]:
    """A layer on a batch whose samples come first, from a layer on rows.

    Returns:
        A function for :class:`OutOfMap`.
    """

    def whole(samples: int, x: torch.Tensor) -> torch.Tensor:
        if rule.features is not None:
            return run(x, Rows(samples))
        return run(x.flatten(0, 1), Rows(samples)).unflatten(0, (samples, -1))

    return whole


class OutOfMap(torch.autograd.Function):
    """Takes a computation out of ``vmap``: it is made on the whole batch, with the samples in dimension 0."""

    @staticmethod
    def forward(compute: Callable[..., Any], *tensors: torch.Tensor) -> Any:  # noqa: D102
        raise NotImplementedError("a layer was called outside of the mapped samples")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: D102
        raise NotImplementedError

    @staticmethod
    def vmap(info: Any, in_dims: Any, compute: Callable[..., Any], *tensors: torch.Tensor) -> Any:  # noqa: D102
        samples = info.batch_size
        whole = [
            t.unsqueeze(0).expand(samples, *t.shape) if dim is None else t.movedim(dim, 0)
            for t, dim in zip(tensors, in_dims[1:], strict=True)
        ]
        found = compute(samples, *whole)
        return found, 0 if isinstance(found, torch.Tensor) else (0,) * len(found)


class LayerForward(ReplacedForward):
    """For a layer that a rule knows.

    Args:
        rule: how it is computed and accounted for.
    """

    def __init__(self, handle: BookkeepingHandle, module: nn.Module, path: str, rule: LayerRule) -> None:
        super().__init__(handle, module, path)
        self.rule = rule
        self.sources = sources(module)

    @override
    def recorded(self, call: RootCall, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = only_input(self.module, args, kwargs)
        return self._applied(call, *self._placed(x, self.input_dim(number), call.samples))

    @override
    def inside(self, call: RootCall, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._applied(call, only_input(self.module, args, kwargs), None)

    def _applied(self, call: RootCall, x: torch.Tensor, where: Rows | None) -> torch.Tensor:
        weight, bias = (getattr(self.module, name, None) for name in ("weight", "bias"))
        own = self.sources if self.handle.shards is None else sources(self.module)
        apply = Apply(call, self.handle.anchor, own)
        return apply(self.rule, self.module, x, where, weight=weight, bias=bias)

    def _placed(self, x: torch.Tensor, layout: SampleDim | None, samples: int) -> tuple[torch.Tensor, Rows]:
        # An input that is the same for all samples (positions) is given to each row of them.
        if layout is not None:
            return x, rows.rows_of(x, layout, samples)
        batch = x.shape[0] == 1 if x.dim() > max(1, self.rule.features or 0) else False
        if not batch and self.rule.features is None:
            raise NotImplementedError(f"`{self.path}` is called with a batch that does not depend on the samples")
        whole = x if batch else x.unsqueeze(0)
        plan, counts = self.handle.plan, self.handle.counts() if self.handle.plan.per_person else ()
        number = sum(counts) or samples * plan.views
        return whole.expand(number, *whole.shape[1:]), Rows(samples, counts=counts)


def sources(module: nn.Module) -> tuple[nn.Parameter, ...]:
    """Parameters that a module's weight or bias may be computed from, by a parametrisation or a hook.

    Returns:
        Its trained parameters except those that are called weight and bias.
    """
    own = {id(module._parameters.get(name)) for name in ("weight", "bias")}
    return tuple(p for p in module.parameters() if p.requires_grad and id(p) not in own)


def only_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The one tensor that a layer was called with.

    Returns:
        The tensor.

    Raises:
        NotImplementedError: there is something else.
    """
    given = [*args, *kwargs.values()]
    if len(given) != 1 or not isinstance(given[0], torch.Tensor):
        raise NotImplementedError(f"{type(module).__name__} was called with more than its input")
    return given[0]

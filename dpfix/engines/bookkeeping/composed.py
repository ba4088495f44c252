"""Layers made of others that are known: attention, bilinear maps, bags of embeddings."""

from __future__ import annotations

import types
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import activation
from typing_extensions import override

from dpfix.engines.bookkeeping.embedding import Embedding
from dpfix.engines.bookkeeping.forward import Apply, CompositeForward
from dpfix.engines.bookkeeping.iteration import RootCall
from dpfix.engines.bookkeeping.layer_rule import plainly
from dpfix.engines.bookkeeping.linear import Linear
from dpfix.layout.rows import Rows, rows_of
from dpfix.layout.sample_dim import SampleDim

_LINEAR, _EMBEDDING = Linear(), Embedding()


class ComposedForward(CompositeForward):
    """What these layers share: they are computed by applying rules, on the whole batch or under ``vmap``."""

    @override
    def recorded(self, call: RootCall, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.compute(self.rules_in(call), self.place(call, number, args, kwargs), args, kwargs)

    @override
    def inside(self, call: RootCall, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.compute(self.rules_in(call), None, args, kwargs)

    def place(self, call: RootCall, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Rows:
        """Where the samples are in the first input.

        Args:
            number: how many calls of this layer came before in the step.

        Returns:
            The rows.

        Raises:
            NotImplementedError: not all inputs carry the samples in the same way.
        """
        every = [*args, *kwargs.values()]
        tensors = [t for t in every if isinstance(t, torch.Tensor)]
        dims = [self.input_dim(number, i) for i in range(len(tensors))]
        if dims[0] is None or any(d is not None and d != dims[0] for d in dims):
            raise NotImplementedError(f"the inputs of `{self.path}` carry the samples in different ways")
        return rows_of(tensors[0], dims[0], call.samples)

    @abstractmethod
    def compute(self, apply: Apply, where: Rows | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The layer's output.

        Args:
            where: where the samples are; ``None`` under ``vmap``.

        Returns:
            The output.
        """


class BilinearForward(ComposedForward):
    """For ``nn.Bilinear``: a linear layer on the products of both inputs."""

    @override
    @staticmethod
    def accepts(module: nn.Module) -> bool:
        return plainly(module, nn.Bilinear)

    @override
    def compute(self, apply: Apply, where: Rows | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module: Any = self.module
        left, right = _pair(*args, **kwargs)
        products = (left.unsqueeze(-1) * right.unsqueeze(-2)).flatten(-2)
        return apply(_LINEAR, module, products, where, weight=module.weight, bias=module.bias)


def _pair(input1: torch.Tensor, input2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return input1, input2


class EmbeddingBagForward(ComposedForward):
    """For ``nn.EmbeddingBag``: an embedding whose looked-up rows are then reduced."""

    @override
    @staticmethod
    def accepts(module: nn.Module) -> bool:
        """Not where it rescales its table, or counts the batch."""
        return plainly(module, nn.EmbeddingBag) and not module.scale_grad_by_freq and module.max_norm is None  # type: ignore[union-attr]

    @override
    def place(self, call: RootCall, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Rows:
        """In dimension 0 of the ids, or of the bags' offsets."""
        ids, offsets, _ = _bag(*args, **kwargs)
        bags = len(ids) if offsets is None else len(offsets) - bool(self.module.include_last_offset)
        if offsets is None:
            return super().place(call, number, args, kwargs)
        if bags != call.samples:
            raise NotImplementedError(f"`{self.path}` is called with several bags per sample")
        return Rows(call.samples)

    @override
    def compute(self, apply: Apply, where: Rows | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module: Any = self.module
        ids, offsets, weights = _bag(*args, **kwargs)
        real = torch.ones_like(ids, dtype=torch.bool)
        if offsets is not None:
            ids, weights, real = _padded(ids, offsets, weights, bool(module.include_last_offset))
        if module.padding_idx is not None:
            real = real & (ids != module.padding_idx)
        plain = types.SimpleNamespace(padding_idx=None)
        found = apply(_EMBEDDING, plain, ids, where, weight=module.weight)
        if module.mode == "max":
            lowest = found.masked_fill(~real.unsqueeze(-1), -torch.inf).max(-2).values
            return lowest.masked_fill(~real.any(-1, keepdim=True), 0)
        total = (found * (real if weights is None else real * weights).unsqueeze(-1)).sum(-2)
        return total / real.sum(-1, keepdim=True).clamp(min=1) if module.mode == "mean" else total


def _bag(input: torch.Tensor, offsets: Any = None, per_sample_weights: Any = None) -> tuple[torch.Tensor, Any, Any]:
    return input, offsets, per_sample_weights


def _padded(
    ids: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor | None, last: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """One row per bag: ids, weights, and which of them are in the bag."""
    ends = offsets[1:] if last else torch.cat([offsets[1:], offsets.new_tensor([len(ids)])])
    starts = offsets[:-1] if last else offsets
    lengths = ends - starts
    place = torch.arange(max(1, int(lengths.max())), device=ids.device)
    real = place < lengths[:, None]
    index = torch.where(real, starts[:, None] + place, 0)
    if not len(ids):
        return index, None if weights is None else index.to(weights.dtype), real
    return ids[index], None if weights is None else weights[index], real


class AttentionForward(ComposedForward):
    """For ``nn.MultiheadAttention``: PyTorch's own code, in which the linear projections are recorded."""

    @override
    @staticmethod
    def accepts(module: nn.Module) -> bool:
        """Not with learnt keys and values."""
        return plainly(module, nn.MultiheadAttention) and module.bias_k is None  # type: ignore[union-attr]

    @override
    @staticmethod
    def on_the_batch(module: Any, dims: Sequence[SampleDim]) -> bool:
        return len(dims) >= 3 and all(d.dim == (0 if module.batch_first else 1) for d in dims[:3])

    @override
    def place(self, call: RootCall, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Rows:
        """In dimension 1: PyTorch has put time first."""
        query, key, value = _three(*args, **kwargs)
        batch = 0 if self.module.batch_first else 1  # type: ignore[truthy-bool]
        for place, tensor in enumerate((query, key, value)):
            dim = self.input_dim(number, place)
            if tensor.dim() != 3 or dim is None or dim.dim != batch:
                raise NotImplementedError(
                    f"an input of `{self.path}` does not carry the samples in its batch dimension"
                )
        dim = self.input_dim(number)
        assert dim is not None
        return replace(rows_of(query, dim, call.samples), dim=1)

    @override
    def compute(self, apply: Apply, where: Rows | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module: Any = self.module
        query = _three(*args, **kwargs)[0]
        rows = query.shape[0 if module.batch_first else 1]

        def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
            # [time * batch, features] before the last projection
            grid = x if where is None or x.dim() == 3 else x.unflatten(0, (-1, rows))
            out = apply(_LINEAR, module, grid, where, weight=weight, bias=bias)
            return out if grid is x else out.flatten(0, 1)

        return _with_linear(linear)(module, *args, **kwargs)


def _three(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, ...]:
    return query, key, value


def _with_linear(linear: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    """``nn.MultiheadAttention.forward`` as PyTorch has it, with another function in the place of ``F.linear``."""
    names: dict[str, Any] = {**vars(F), "linear": linear}
    for name in ("_in_projection_packed", "_in_projection", "multi_head_attention_forward"):
        names[name] = _with_names(getattr(F, name), names)
    return _with_names(nn.MultiheadAttention.forward, {**vars(activation), "F": types.SimpleNamespace(**names)})


def _with_names(function: Any, names: dict[str, Any]) -> Any:
    new = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    new.__kwdefaults__ = function.__kwdefaults__
    return new


COMPOSED: tuple[type[ComposedForward], ...] = (BilinearForward, EmbeddingBagForward, AttentionForward)
"""The layers of this kind."""

"""Linear layers: per-sample weight gradient ``g_i^T a_i``, a product of two matrices with one row per position.

Its norm is had without it from Gram matrices (Li et al., "Large Language Models Can Be Strong Differentially Private
Learners", 2022, section 4: ``|g^T a|^2 = <a a^T, g g^T>``), which is cheaper when there are few positions. The choice
follows Bu et al., "Differentially Private Optimization on Large Model at Small Cost", 2023 (book-keeping).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import nn
from typing_extensions import override

from dpfix.engines.bookkeeping.blocks import at_once
from dpfix.engines.bookkeeping.contributions import (
    Contribution,
    Kept,
    Measured,
    chosen,
    full_precision,
    sizes,
    squared,
    zeroed,
)
from dpfix.engines.bookkeeping.layer_rule import LayerCall, LayerRule, autocast, plainly

KEEP_RATIO = 1.8
"""Per-sample gradients are kept while they are at most this many times larger than activation and output gradient."""
BYTE_COST = 16
"""Multiply-adds that cost as much time as moving one number to and from memory."""
CALL_COST = 1_000_000
"""Multiply-adds that cost as much time as calling one more kernel."""


class Outer(Contribution):
    """``sum_t g_it^T a_it`` by its factors.

    Args:
        a: layer inputs, shape ``[samples, positions, in]``.
        g: output gradients, shape ``[samples, positions, out]``.
        shape: shape of the parameter, ``out * in`` numbers.
        directly: whether norms may not come from Gram matrices.
    """

    def __init__(self, a: torch.Tensor, g: torch.Tensor, shape: torch.Size, *, directly: bool = False) -> None:
        self.a, self.g, self.shape, self._directly = full_precision(a), full_precision(g), shape, directly

    @override
    def squared_norms(self) -> torch.Tensor:
        return self.measured().squared

    @override
    def measured(self) -> Measured:
        """By Gram matrices, or by products of some samples at a time into a reused buffer, whichever is cheaper."""
        positions, wide, high = self.a.shape[1], self.a.shape[2], self.g.shape[2]
        if positions == 1:
            return Measured(sizes(self.a, self.g).square())
        product = (positions + 2 * BYTE_COST) * wide * high + CALL_COST
        if not self._directly and gram_cost(positions, wide, high) < product:
            gram = torch.bmm(self.a, self.a.mT).mul_(torch.bmm(self.g, self.g.mT))
            return Measured(gram.sum((1, 2)).clamp_(min=0), of_terms(gram), gram=True)
        some = at_once(self.a.device, wide * high, len(self.a))
        buffer, squares = self.a.new_empty(min(some, len(self.a)), high, wide), []
        for a, g in zip(self.a.split(some), self.g.split(some), strict=True):
            squares.append(squared(torch.bmm(g.mT, a, out=buffer[: len(a)]).flatten(1)))
        return Measured(torch.cat(squares), sizes(self.a, self.g))

    @override
    def picked(self, samples: torch.Tensor, double: bool) -> Outer:
        a, g = (chosen(t, samples, double) for t in (self.a, self.g))
        return Outer(a, g, self.shape, directly=True)

    @property
    @override
    def kind(self) -> Hashable:
        return Outer, self.a.shape[2], self.g.shape[2]

    @override
    def joined(self, others: Sequence[Outer]) -> Outer:
        """One call with all their positions."""
        every = [self, *others]
        return Outer(torch.cat([o.a for o in every], 1), torch.cat([o.g for o in every], 1), self.shape)

    @override
    def per_sample(self) -> torch.Tensor:
        return torch.bmm(self.g.mT, self.a).view(-1, *self.shape)

    @override
    def weighted_sum(self, factors: torch.Tensor) -> torch.Tensor:
        """One ordinary weight gradient, with the factors on the smaller operand."""
        a, g, scale = self.a, self.g, factors.to(self.a.dtype).view(-1, 1, 1)
        if a.shape[2] < g.shape[2]:
            a = a * scale
        else:
            g = g * scale
        total = torch.mm(g.flatten(0, 1).mT, a.flatten(0, 1))
        return total if total.shape == self.shape else total.view(self.shape)

    @override
    def without(self, samples: torch.Tensor) -> Outer:
        return Outer(zeroed(self.a, samples), zeroed(self.g, samples), self.shape)


def of_terms(products: torch.Tensor) -> torch.Tensor:
    """Norms of the terms of a sum, added up.

    Args:
        products: of every term with every other, shape ``[samples, terms, terms]``.

    Returns:
        Shape ``[samples]``.
    """
    return products.diagonal(dim1=1, dim2=2).sqrt().sum(1)


def gram_cost(positions: int, wide: int, high: int) -> int:
    """Multiply-adds of the two Gram matrices of one sample.

    Args:
        positions: rows.
        wide: numbers per row of one factor.
        high: numbers per row of the other.

    Returns:
        The cost.
    """
    return positions * positions * (wide + high + BYTE_COST)


def outer(a: torch.Tensor, g: torch.Tensor, shape: torch.Size) -> Contribution:
    """The cheaper form of ``g_i^T a_i``: kept as it is, or by its factors.

    Args:
        a: shape ``[samples, positions, in]``.
        g: shape ``[samples, positions, out]``.

    Returns:
        The contribution.
    """
    positions, wide, high = a.shape[1], a.shape[2], g.shape[2]
    factors = Outer(a, g, shape)
    kept_size, factor_size = wide * high, positions * (wide + high)
    small = kept_size <= KEEP_RATIO * factor_size
    if small and gram_cost(positions, wide, high) > 3 * BYTE_COST * wide * high:
        return Kept(factors.per_sample())
    return factors


class Linear(LayerRule):
    """``nn.Linear`` with any leading dimensions, and whatever else is a product of rows with a weight."""

    features = 1

    @override
    def accepts(self, module: nn.Module) -> bool:
        return plainly(module, nn.Linear)

    @override
    def forward(self, call: LayerCall, x: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]:
        """``x W^T + b`` from ``[..., in]`` to ``[..., out]``; a weight of more than two dimensions has one row per output."""
        assert call.weight is not None
        x, weight, bias = autocast(x, call.weight.flatten(1), call.bias)
        return linear(x, weight, bias), (x, weight)

    @override
    def backward(
        self, call: LayerCall, saved: tuple[torch.Tensor, ...], g: torch.Tensor, wanted: bool
    ) -> torch.Tensor | None:
        x, weight = saved
        by_sample = call.rows.matrices(g)
        if call.trains("bias"):
            call.report("bias", Kept(full_precision(by_sample).sum(1)))
        if call.trains("weight"):
            assert call.weight is not None
            call.report("weight", outer(call.rows.matrices(x), by_sample, call.weight.shape))
        return g @ weight if wanted else None


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``F.linear`` whose result is no view, so that it may be modified in place.

    Args:
        x: shape ``[..., in]``.
        weight: shape ``[out, in]``.
        bias: shape ``[out]``.

    Returns:
        Shape ``[..., out]``.
    """
    rows = x.reshape(-1, x.shape[-1])
    out = torch.mm(rows, weight.mT) if bias is None else torch.addmm(bias, rows, weight.mT)
    return torch.ops.aten._unsafe_view(out, [*x.shape[:-1], weight.shape[0]]) if x.dim() != 2 else out

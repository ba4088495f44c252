"""Embeddings: the per-sample gradient has as many non-zero rows as a sample has different tokens."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from typing_extensions import override

from dpfix.engines.bookkeeping.contributions import (
    Contribution,
    Measured,
    chosen,
    full_precision,
    sizes,
    squared,
    zeroed,
)
from dpfix.engines.bookkeeping.layer_rule import LayerCall, LayerRule, plainly
from dpfix.engines.bookkeeping.linear import Outer


class Lookup(Contribution):
    """``sum_t onehot(id_it) g_it^T`` by its factors.

    Args:
        ids: shape ``[samples, positions]``.
        g: output gradients, zero where the padding token was looked up, shape ``[samples, positions, width]``.
        rows: number of rows of the table.
    """

    def __init__(self, ids: torch.Tensor, g: torch.Tensor, rows: int) -> None:
        self.ids, self.g, self.rows = ids, full_precision(g), rows

    @override
    def squared_norms(self) -> torch.Tensor:
        """The gradient of a row of the table is the sum over the places where the sample has that token."""
        samples = len(self.ids)
        if self.ids.shape[1] == 1:
            return squared(self.g.flatten(1))
        sample = torch.arange(samples, device=self.ids.device)[:, None]
        keys, place = torch.unique(self.ids + sample * self.rows, return_inverse=True)
        sums = self.g.new_zeros(len(keys), self.g.shape[2]).index_add_(0, place.flatten(), self.g.flatten(0, 1))
        return self.g.new_zeros(samples).index_add_(0, keys // self.rows, squared(sums))

    @override
    def measured(self) -> Measured:
        positions = self.ids.shape[1]
        return Measured(self.squared_norms(), None if positions == 1 else sizes(self.g) * math.sqrt(positions))

    @override
    def picked(self, samples: torch.Tensor, double: bool) -> Lookup:
        return Lookup(self.ids[samples], chosen(self.g, samples, double), self.rows)

    @property
    @override
    def kind(self) -> Hashable:
        return Lookup

    @override
    def joined(self, others: Sequence[Lookup]) -> Lookup:
        """One call with all their positions."""
        every = [self, *others]
        return Lookup(torch.cat([o.ids for o in every], 1), torch.cat([o.g for o in every], 1), self.rows)

    @override
    def per_sample(self) -> torch.Tensor:
        samples = len(self.ids)
        keys = (self.ids + torch.arange(samples, device=self.ids.device)[:, None] * self.rows).flatten()
        dense = self.g.new_zeros(samples * self.rows, self.g.shape[2])
        return dense.index_add_(0, keys, self.g.flatten(0, 1)).view(samples, self.rows, -1)

    @override
    def weighted_sum(self, factors: torch.Tensor) -> torch.Tensor:
        """One ordinary embedding gradient."""
        scaled = self.g * factors.to(self.g.dtype)[:, None, None]
        return torch.ops.aten.embedding_dense_backward(scaled, self.ids, self.rows, -1, False)

    @override
    def without(self, samples: torch.Tensor) -> Lookup:
        return Lookup(self.ids, zeroed(self.g, samples), self.rows)


class Tied(Contribution):
    """A table that is looked up and also multiplies, as the input and output embedding of a language model.

    Args:
        lookup: its use as a table, of shape ``[rows, width]``.
        product: its use as a weight, of the same shape.
    """

    def __init__(self, lookup: Lookup, product: Outer) -> None:
        self.lookup, self.product = lookup, product

    @override
    def squared_norms(self) -> torch.Tensor:
        return self.measured().squared

    @override
    def measured(self) -> Measured:
        """``|a|^2 + |b|^2 + 2 <a, b>``, where ``<a, b> = sum_ts <g_t, a_s> g'_s[id_t]``."""
        ids, g, product = self.lookup.ids, self.lookup.g, self.product
        picked = product.g.gather(2, ids.unsqueeze(1).expand(-1, product.g.shape[1], -1))
        both = (torch.bmm(product.a, g.mT) * picked).sum((1, 2))
        one, other = self.lookup.measured(), product.measured()
        looked_up, multiplied = (m.squared.sqrt() if m.terms is None else m.terms for m in (one, other))
        return Measured((one.squared + other.squared + 2 * both).clamp_(min=0), looked_up + multiplied, gram=True)

    @override
    def picked(self, samples: torch.Tensor, double: bool) -> Contribution:
        """In double precision, so that ``<a, b>`` may cancel the squares."""
        return Tied(self.lookup.picked(samples, True), self.product.picked(samples, True))

    @override
    def per_sample(self) -> torch.Tensor:
        return self.lookup.per_sample() + self.product.per_sample()

    @override
    def weighted_sum(self, factors: torch.Tensor) -> torch.Tensor:
        return self.lookup.weighted_sum(factors).add_(self.product.weighted_sum(factors))

    @override
    def without(self, samples: torch.Tensor) -> Tied:
        return Tied(self.lookup.without(samples), self.product.without(samples))


class Embedding(LayerRule):
    """``nn.Embedding``."""

    features = 0

    @override
    def accepts(self, module: nn.Module) -> bool:
        """Not with frequency scaling, which couples the samples, nor with rows that are rescaled."""
        return plainly(module, nn.Embedding) and not module.scale_grad_by_freq and module.max_norm is None  # type: ignore[union-attr]

    @override
    def forward(self, call: LayerCall, x: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]:
        """From ids of any shape to ``[*ids, width]``."""
        assert call.weight is not None
        weight = call.weight
        out = F.embedding(x.reshape(-1), weight)
        return torch.ops.aten._unsafe_view(out, [*x.shape, weight.shape[1]]), (x,)

    @override
    def backward(
        self, call: LayerCall, saved: tuple[torch.Tensor, ...], g: torch.Tensor, wanted: bool
    ) -> torch.Tensor | None:
        (ids,) = saved
        padding = call.module.padding_idx
        if call.trains("weight"):
            assert call.weight is not None
            by_sample = call.rows.matrices(ids.unsqueeze(-1)).squeeze(-1).long()
            rows = call.rows.matrices(g)
            if padding is not None:
                rows = rows.masked_fill((by_sample == padding).unsqueeze(-1), 0)
            call.report("weight", Lookup(by_sample, rows, len(call.weight)))
        return None

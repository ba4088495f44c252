"""Embeddings: the per-sample gradient has as many non-zero rows as a sample has different tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dpfix.engines.bookkeeping.calls import LayerCall, Rule
from dpfix.engines.bookkeeping.contributions import full_precision, squared


class Lookup:
    """``sum_t onehot(id_it) g_it^T`` by its factors.

    Args:
        ids: shape ``[samples, positions]``.
        g: output gradients, zero where the padding token was looked up, shape ``[samples, positions, width]``.
        rows: number of rows of the table.
    """

    def __init__(self, ids: torch.Tensor, g: torch.Tensor, rows: int) -> None:
        self.ids, self.g, self.rows = ids, full_precision(g), rows

    def squared_norms(self) -> torch.Tensor:
        """The gradient of a row of the table is the sum over the places where the sample has that token.

        Returns:
            Shape ``[samples]``.
        """
        samples = len(self.ids)
        if self.ids.shape[1] == 1:
            return squared(self.g.flatten(1))
        sample = torch.arange(samples, device=self.ids.device)[:, None]
        keys, place = torch.unique(self.ids + sample * self.rows, return_inverse=True)
        sums = self.g.new_zeros(len(keys), self.g.shape[2]).index_add_(0, place.flatten(), self.g.flatten(0, 1))
        return self.g.new_zeros(samples).index_add_(0, keys // self.rows, squared(sums))

    def per_sample(self) -> torch.Tensor:
        """See :class:`Contribution`.

        Returns:
            Shape ``[samples, rows, width]``.
        """
        samples = len(self.ids)
        keys = (self.ids + torch.arange(samples, device=self.ids.device)[:, None] * self.rows).flatten()
        dense = self.g.new_zeros(samples * self.rows, self.g.shape[2])
        return dense.index_add_(0, keys, self.g.flatten(0, 1)).view(samples, self.rows, -1)

    def weighted_sum(self, factors: torch.Tensor) -> torch.Tensor:
        """One ordinary embedding gradient.

        Args:
            factors: shape ``[samples]``.

        Returns:
            Shape ``[rows, width]``.
        """
        scaled = self.g * factors.to(self.g.dtype)[:, None, None]
        return torch.ops.aten.embedding_dense_backward(scaled, self.ids, self.rows, -1, False)


class Embedding(Rule):
    """``nn.Embedding``."""

    features = 0

    def accepts(self, module: nn.Module) -> bool:
        """Whether it is an Embedding with PyTorch's own forward; frequency scaling couples the samples.

        Args:
            module: a module.

        Returns:
            Whether it is.
        """
        plain = isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward
        return plain and not module.scale_grad_by_freq and module.max_norm is None  # type: ignore[union-attr]

    def forward(self, call: LayerCall, x: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]:
        """Look the ids up.

        Args:
            call: the call.
            x: ids of any shape.

        Returns:
            Shape ``[*ids, width]``; the ids are kept.
        """
        weight: torch.Tensor = call.module.weight  # type: ignore[assignment]
        out = F.embedding(x.reshape(-1), weight)
        return torch.ops.aten._unsafe_view(out, [*x.shape, weight.shape[1]]), (x,)

    def backward(
        self, call: LayerCall, saved: tuple[torch.Tensor, ...], g: torch.Tensor, wanted: bool
    ) -> torch.Tensor | None:
        """See :class:`Rule`.

        Args:
            call: the call.
            saved: the ids.
            g: shape ``[*ids, width]``.
            wanted: never; ids have no gradient.

        Returns:
            Nothing.
        """
        (ids,) = saved
        module: Any = call.module
        weight = call.parameter("weight")
        if weight is not None:
            by_sample = call.rows.matrices(ids.unsqueeze(-1)).squeeze(-1).long()
            rows = call.rows.matrices(g)
            if module.padding_idx is not None:
                rows = rows.masked_fill((by_sample == module.padding_idx).unsqueeze(-1), 0)
            call.report(weight, Lookup(by_sample, rows, len(weight)))
        return None

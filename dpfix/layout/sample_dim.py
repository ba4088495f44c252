"""How a tensor carries the samples of a batch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from dpfix.instrument import pytree

_UNKNOWN = (0,)
"""Counts of a batch whose samples have unknown numbers of rows: they fit no tensor."""


@dataclass(frozen=True)
class SampleDim:
    """How a tensor carries the samples.

    Attributes:
        dim: the dimension.
        rows: rows per sample in that dimension.
        interleaved: rows of one sample are ``n`` apart (views stacked one after another), not adjacent.
        counts: empty if every sample has :attr:`rows` rows; else sample ``i`` has ``counts[i] * rows`` of them. In a plan
            these are the probe's, in a call of the model those of its batch (:meth:`CallLayout.having`).
    """

    dim: int
    rows: int = 1
    interleaved: bool = False
    counts: tuple[int, ...] = ()

    def samples(self, tensor: torch.Tensor) -> int:
        """Number of samples in a tensor.

        Args:
            tensor: a tensor laid out this way.

        Returns:
            Rows divided by rows per sample; -1 if there are none, if they are not whole samples, or if :attr:`counts`
            do not add up to them.
        """
        size = tensor.shape[self.dim]
        if self.counts:
            return len(self.counts) if size == sum(self.counts) * self.rows else -1
        return -1 if size % self.rows or not size else size // self.rows

    def having(self, counts: tuple[int, ...]) -> SampleDim:
        """The layout in a batch whose samples have other numbers of rows.

        Returns:
            The layout; itself if every sample has the same number.
        """
        return replace(self, counts=counts or _UNKNOWN) if self.counts else self


Layout = tuple[tuple[pytree.Path, SampleDim | None], ...]
"""For every tensor leaf its path, and how it carries the samples (``None``: it does not)."""


def by_row(layout: Layout) -> Layout:
    """The layout of tensors if every row of a sample, where samples have different numbers of them, were a sample."""
    return tuple((path, dim and replace(dim, counts=())) for path, dim in layout)


def having(layout: Layout, counts: tuple[int, ...]) -> Layout:
    """The layout of tensors in a batch whose samples have other numbers of rows."""
    return tuple((path, dim and dim.having(counts)) for path, dim in layout)

"""How a tensor carries the samples of a batch."""

from __future__ import annotations

from collections.abc import Sequence
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
            Rows divided by rows per sample, rounded down; -1 if :attr:`counts` do not add up to the rows.
        """
        size = tensor.shape[self.dim]
        if self.counts:
            return len(self.counts) if size == sum(self.counts) * self.rows else -1
        return size // self.rows

    def having(self, counts: tuple[int, ...]) -> SampleDim:
        """The layout in a batch whose samples have other numbers of rows.

        Args:
            counts: the numbers.

        Returns:
            The layout; itself if every sample has the same number.
        """
        return replace(self, counts=counts or _UNKNOWN) if self.counts else self

    def take(self, tensor: torch.Tensor, sample: int, samples: int) -> torch.Tensor:
        """The rows of one sample.

        Args:
            tensor: a tensor laid out this way.
            sample: index of the sample.
            samples: number of samples in the tensor.

        Returns:
            A view.
        """
        if self.interleaved:
            index = [slice(None)] * tensor.dim()
            index[self.dim] = slice(sample, None, samples)
            return tensor[tuple(index)]
        if self.counts:
            first = sum(self.counts[:sample])
            return tensor.narrow(self.dim, first * self.rows, self.counts[sample] * self.rows)
        return tensor.narrow(self.dim, sample * self.rows, self.rows)

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The inverse of :meth:`take` over all samples.

        Args:
            parts: one tensor per sample.

        Returns:
            The batch.
        """
        if not self.interleaved:
            return torch.cat(tuple(parts), self.dim)
        stacked = torch.stack(tuple(parts), self.dim + 1)
        return stacked.flatten(self.dim, self.dim + 1)


Layout = tuple[tuple[pytree.Path, SampleDim | None], ...]
"""For every tensor leaf its path, and how it carries the samples (``None``: it does not)."""


def having(layout: Layout, counts: tuple[int, ...]) -> Layout:
    """The layout of tensors in a batch whose samples have other numbers of rows.

    Args:
        layout: the layout.
        counts: the numbers.

    Returns:
        The layout.
    """
    return tuple((path, dim and dim.having(counts)) for path, dim in layout)

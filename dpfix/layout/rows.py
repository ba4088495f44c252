"""The rows of a tensor by the sample they belong to: one sample's, some samples', regrouped, put together again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from dpfix.errors import PlanBrokenError
from dpfix.layout.sample_dim import SampleDim

_FEW = 4


@dataclass(frozen=True)
class Rows:
    """Where the samples are in one tensor: a :class:`SampleDim` with the number of samples.

    Attributes:
        samples: number of samples.
        dim: the dimension that carries them.
        interleaved: whether the rows of one sample are ``samples`` apart.
        counts: rows of every sample, where these are not the same for all; a sample with fewer of them than others is
            filled up with zeros where the rows are regrouped.
    """

    samples: int
    dim: int = 0
    interleaved: bool = False
    counts: tuple[int, ...] = ()

    @classmethod
    def of(cls, dim: SampleDim, samples: int) -> Rows:
        """The rows of a tensor that is known to be laid out in some way; :func:`rows_of` looks whether it is."""
        return cls(samples, dim.dim, dim.interleaved, tuple(n * dim.rows for n in dim.counts))

    @property
    def plain(self) -> bool:
        """Whether the rows of the samples lie one after another in dimension 0, the same number for each."""
        return self.dim == 0 and not self.interleaved and not self.counts

    def split(self, tensor: torch.Tensor) -> torch.Tensor:
        """Give every sample its own leading index.

        Args:
            tensor: shape ``[..., samples * rows, ...]`` with the rows in :attr:`dim`.

        Returns:
            Shape ``[samples, ..., rows, ...]``; a view where the layout allows it.
        """
        if self.counts:
            parts = tensor.movedim(self.dim, 0).split(self.counts)
            return nn.utils.rnn.pad_sequence(list(parts), batch_first=True).movedim(1, self.dim + 1)
        rows = tensor.shape[self.dim] // self.samples
        if self.interleaved:
            return tensor.unflatten(self.dim, (rows, self.samples)).movedim(self.dim + 1, 0)
        return tensor.unflatten(self.dim, (self.samples, rows)).movedim(self.dim, 0)

    def merge(self, tensor: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`split`.

        Args:
            tensor: shape ``[samples, ..., rows, ...]``.

        Returns:
            Shape ``[..., samples * rows, ...]``.
        """
        if self.counts:
            parts = [sample.narrow(self.dim, 0, n) for sample, n in zip(tensor, self.counts, strict=True)]
            return torch.cat(parts, self.dim)
        if self.interleaved:
            return tensor.movedim(0, self.dim + 1).flatten(self.dim, self.dim + 1)
        return tensor.movedim(0, self.dim).flatten(self.dim, self.dim + 1)

    def take(self, tensor: torch.Tensor, sample: int) -> torch.Tensor:
        """The rows of one sample, as a view."""
        if self.counts:
            return tensor.narrow(self.dim, sum(self.counts[:sample]), self.counts[sample])
        return self.split(tensor)[sample]

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The inverse of :meth:`take` over all samples."""
        if self.interleaved:
            return torch.stack(tuple(parts), self.dim + 1).flatten(self.dim, self.dim + 1)
        return torch.cat(tuple(parts), self.dim)

    def select(self, tensor: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
        """Some samples in some order, each as often as it is named; laid out like the tensor."""
        counts = tuple(self.counts[i] for i in order) if self.counts else ()
        return replace(self, samples=len(order), counts=counts).merge(self.split(tensor)[list(order)])

    def exchange(self, tensor: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
        """As :meth:`select`; whole numbers that are numbers of a sample's own rows in the batch go along with the rows."""
        found, step = self.select(tensor, order), self._counting(tensor)
        if not step:
            return found
        split = replace(self, samples=len(order)).split(found)
        moved = [step * (place - sample) for place, sample in enumerate(order)]
        shift = torch.tensor(moved, dtype=found.dtype, device=found.device)
        return replace(self, samples=len(order)).merge(split + shift.view(-1, *(1,) * (split.dim() - 1)))

    def counts_rows(self, tensor: torch.Tensor) -> bool:
        """Whether whole numbers are numbers of a sample's own rows in the batch: the edges of graphs that are made one."""
        return self._counting(tensor) > 0

    def _counting(self, tensor: torch.Tensor) -> int:
        """How many rows a sample then has: those of sample ``i`` are below ``(i + 1)`` times as many, and none below ``i`` times.

        Labels that grow from sample to sample look the same; of few samples with one number each, nothing is said.

        Returns:
            The number of rows; 0 if they are no such numbers.
        """
        whole = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool)
        if not whole or self.counts or self.samples < 2 or not tensor.numel():
            return 0
        split = self.split(tensor).flatten(1)
        if split.shape[1] == 1 and self.samples < _FEW:
            return 0
        lowest, highest = split.amin(1).tolist(), split.amax(1).tolist()
        least = 1 + max(high // (i + 1) for i, high in enumerate(highest))
        most = min(low // i for i, low in enumerate(lowest) if i)
        return least if lowest[0] >= 0 and least <= most else 0

    def matrices(self, tensor: torch.Tensor, features: int = 1) -> torch.Tensor:
        """One matrix per sample.

        Args:
            tensor: a tensor laid out this way.
            features: how many trailing dimensions are features.

        Returns:
            Shape ``[samples, positions, features]``.
        """
        if self.dim >= tensor.dim() - features:
            raise NotImplementedError("the samples lie in a feature dimension of a layer")
        if self.plain:
            return tensor.reshape(self.samples, -1, math.prod(tensor.shape[tensor.dim() - features :]))
        split = self.split(tensor)
        return split.reshape(self.samples, -1, math.prod(split.shape[split.dim() - features :]))

    def adjacent(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rows in dimension 0, those of one sample next to each other.

        Args:
            tensor: a tensor laid out this way, with the samples in dimension 0.

        Returns:
            Shape ``[samples * rows, ...]``.
        """
        if self.dim != 0:
            raise NotImplementedError(f"a layer that needs the samples in dimension 0 has them in dimension {self.dim}")
        return tensor if self.plain else self.split(tensor).flatten(0, 1)


def rows_of(tensor: torch.Tensor, layout: SampleDim, samples: int) -> Rows:
    """The rows of a tensor in this call, which may have another number of samples and of rows than the probe.

    Args:
        layout: how the probe's tensor carried its samples.

    Returns:
        Where the samples are.

    Raises:
        PlanBrokenError: the tensor cannot hold that many samples this way.
    """
    size = tensor.shape[layout.dim] if layout.dim < tensor.dim() else -1
    if layout.counts and size == layout.rows * sum(layout.counts):
        return Rows.of(layout, samples)
    if layout.counts or size % samples or size < samples or (layout.rows == 1 and size != samples):
        raise PlanBrokenError(
            f"a layer was called with a tensor of shape {tuple(tensor.shape)}, which does not hold {samples} samples"
            f" in dimension {layout.dim} as the training step showed when it was checked.",
            help="Pass the training_step your loop really makes, or grad_sample_mode='microbatch'.",
        )
    return Rows.of(layout, samples)


def says_an_order(leaf: torch.Tensor) -> bool:
    """Whether a tensor of a batch says which sample has gone where: the numbers of all places, each once."""
    whole = leaf.dim() == 1 and not leaf.is_floating_point() and not leaf.is_complex()
    return whole and leaf.sort().values.tolist() == list(range(len(leaf)))

"""Samplers whose draws are recorded."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from typing_extensions import override

from dpfix.distributed import ALONE, Ranks, new_seed
from dpfix.sampling.cryptographic import Cryptographic
from dpfix.sampling.ledger import DrawLedger
from dpfix.sampling.randomness import Given, Stream
from dpfix.sampling.rate import part_sizes


@dataclass(frozen=True)
class Drawing:
    """How batches are drawn.

    Attributes:
        ledger: where draws are recorded.
        source: random numbers that nobody else draws from; on several ranks, the same ones on all of them.
        ranks: the processes that share every batch.
    """

    ledger: DrawLedger
    source: Stream | Given | Cryptographic
    ranks: Ranks = ALONE


class PoissonSampler(UniformWithReplacementSampler):
    """Draws every index of a set independently with the same probability.

    On several ranks all of them draw the same batch, and each yields its own part of it. There, and in a training with a seed,
    every pass has a seed of its own, so that it does not matter at which batch the pass before was left, or which other passes
    are made at the same time.

    Args:
        indices: the index set.
        drawing: random numbers, ledger and ranks.
        sample_rate: probability of every index.
        steps: number of batches in one pass.
    """

    def __init__(self, indices: list[int], drawing: Drawing, *, sample_rate: float, steps: int) -> None:
        super().__init__(num_samples=len(indices), sample_rate=sample_rate, steps=steps)
        self.indices = torch.as_tensor(indices)
        self.ledger = drawing.ledger
        self.ledger.position.batches = steps
        self.ranks = drawing.ranks
        self.source = drawing.source

    @override
    def __iter__(self) -> Iterator[list[int]]:
        source, position, begun = self.source, self.ledger.position, self.ledger.start()
        known, done = position.begin(begun), begun.latest
        if self.ranks.size > 1 or position.reproducible:
            assert not isinstance(
                source, Cryptographic
            )  # neither seeds nor other ranks go with it; the call refuses them
            begun.seed = new_seed(source.generator()) if known is None else known
            source = Stream((begun.seed,))
        for number in range(1, self.steps + 1):
            # float32 draws have 24 bits: at a rate of 1e-6 they would be off by several percent
            chosen = source.uniform(self.num_samples) < self.sample_rate
            drawn = self.indices[chosen][self.ranks.rank :: self.ranks.size].tolist()
            if number > done:
                begun.drew(len(drawn))
            elif begun.reads_again:
                begun.drew_again(len(drawn))
            else:
                continue
            yield drawn
        if not begun.delivers:
            begun.end()


class RecordedBatches:
    """Any other batch sampler put into a private loader, an iterable of index lists, with its draws recorded."""

    def __init__(self, batches: Any, ledger: DrawLedger) -> None:
        self.batches = batches
        self.ledger = ledger

    def __iter__(self) -> Iterator[list[int]]:
        begun = self.ledger.start()
        for indices in self.batches:
            begun.drew(len(indices))
            yield indices
        if not begun.delivers:
            begun.end()

    def __len__(self) -> int:
        return len(self.batches)


class PhysicalBatches:
    """The batches of a sampler in parts, for a ``BatchMemoryManager``.

    Args:
        batches: a sampler whose draws are recorded.
        most: samples in a part at most.
    """

    def __init__(self, batches: Any, most: int) -> None:
        self.batches = batches
        self.most = most

    def __iter__(self) -> Iterator[list[int]]:
        for indices in self.batches:
            ends = accumulate(part_sizes(len(indices), self.most), initial=0)
            yield from (list(indices[start:end]) for start, end in pairwise(ends))

    def __len__(self) -> int:
        rate, samples = getattr(self.batches, "sample_rate", None), getattr(self.batches, "num_samples", 0)
        return len(self.batches) if rate is None else math.ceil(len(self.batches) * rate * samples / self.most)

"""Samplers whose draws are recorded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from typing_extensions import override

from dpfix.distributed import ALONE, Ranks, new_seed
from dpfix.sampling.ledger import DrawLedger
from dpfix.sampling.randomness import Given, Stream


@dataclass(frozen=True)
class Drawing:
    """How batches are drawn.

    Attributes:
        ledger: where draws are recorded.
        source: random numbers that nobody else draws from; on several ranks, the same ones on all of them.
        ranks: the processes that share every batch.
    """

    ledger: DrawLedger
    source: Stream | Given
    ranks: Ranks = ALONE


class PoissonSampler(UniformWithReplacementSampler):
    """Draws every index of a set independently with the same probability.

    On several ranks all of them draw the same batch, and each yields its own part of it. Every pass has a seed of its own, so
    that it does not matter at which batch a rank has left the pass before.

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
        source, seed = self.source, 0
        done, read_again = self.ledger.position.begin(source)
        if self.ranks.size > 1:
            seed = new_seed(source.generator())
            source = Stream((seed,))
        self.ledger.start(seed, done)
        for number in range(self.steps):
            # float32 draws have 24 bits: at a rate of 1e-6 they would be off by several percent
            chance = torch.rand(self.num_samples, generator=source.generator(), dtype=torch.float64)
            drawn = self.indices[chance < self.sample_rate][self.ranks.rank :: self.ranks.size].tolist()
            if number >= done:
                self.ledger.drew(len(drawn))
            if number >= done - read_again:
                yield drawn


class RecordedBatches:
    """Any other batch sampler put into a private loader, an iterable of index lists, with its draws recorded."""

    def __init__(self, batches: Any, ledger: DrawLedger) -> None:
        self.batches = batches
        self.ledger = ledger

    def __iter__(self) -> Iterator[list[int]]:
        self.ledger.start()
        for indices in self.batches:
            self.ledger.drew(len(indices))
            yield indices

    def __len__(self) -> int:
        return len(self.batches)

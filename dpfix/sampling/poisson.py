"""Samplers whose draws are recorded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from opacus.utils.uniform_sampler import UniformWithReplacementSampler

from dpfix.distributed import ALONE, Ranks, new_seed
from dpfix.sampling.ledger import DrawLedger


class PoissonSampler(UniformWithReplacementSampler):
    """Draws every index of a set independently with the same probability.

    On several ranks all of them draw the same batch, and each yields its own part of it. Every pass has a seed of its own, so
    that it does not matter where the ranks have left the one before.

    Args:
        indices: the index set.
        sample_rate: probability of every index.
        steps: number of batches in one pass.
        generator: source of randomness; on several ranks, one that gives all of them the same numbers.
        ledger: where draws are recorded.
        ranks: the processes that share every batch.
    """

    def __init__(
        self,
        indices: list[int],
        *,
        sample_rate: float,
        steps: int,
        generator: torch.Generator | None,
        ledger: DrawLedger,
        ranks: Ranks = ALONE,
    ) -> None:
        super().__init__(num_samples=len(indices), sample_rate=sample_rate, generator=generator, steps=steps)
        self.indices = torch.as_tensor(indices)
        self.ledger = ledger
        self.ranks = ranks

    def __iter__(self) -> Iterator[list[int]]:
        generator, seed = self.generator, 0
        if self.ranks.size > 1:
            seed = new_seed(generator)
            generator = torch.Generator().manual_seed(seed)
        self.ledger.start(seed)
        for _ in range(self.steps):
            # float32 draws have 24 bits: at a rate of 1e-6 they would be off by several percent
            chance = torch.rand(self.num_samples, generator=generator, dtype=torch.float64)
            drawn = self.indices[chance < self.sample_rate][self.ranks.rank :: self.ranks.size].tolist()
            self.ledger.drew(len(drawn))
            yield drawn


class RecordedBatches:
    """Any other batch sampler put into a private loader, with its draws recorded.

    Args:
        batches: an iterable of index lists.
        ledger: where draws are recorded.
    """

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

"""Samplers whose draws are recorded."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from typing_extensions import override

from dpfix.errors import LoaderError
from dpfix.instrument.source import warn_user
from dpfix.sampling.cryptographic import Cryptographic
from dpfix.sampling.ledger import DrawLedger
from dpfix.sampling.randomness import Given, Stream
from dpfix.sampling.ranks import ALONE, Ranks, new_seed
from dpfix.sampling.rate import largest_batch


@dataclass(frozen=True)
class Drawing:
    """How batches are drawn.

    Attributes:
        ledger: where draws are recorded.
        source: random numbers that nobody else draws from; on several ranks, the same ones on all of them.
        ranks: the processes that share every batch.
        sampling: how; see :data:`dpfix.scan.options.SAMPLINGS`.
    """

    ledger: DrawLedger
    source: Stream | Given | Cryptographic
    ranks: Ranks = ALONE
    sampling: str = "poisson"


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

    Attributes:
        largest: size that a draw is cut to, by chance; ``None`` where it is not.
    """

    def __init__(self, indices: list[int], drawing: Drawing, *, sample_rate: float, steps: int) -> None:
        super().__init__(num_samples=len(indices), sample_rate=sample_rate, steps=steps)
        self.indices = torch.as_tensor(indices)
        self.ledger = drawing.ledger
        self.ledger.position.batches = steps
        self.ranks = drawing.ranks
        self.source = drawing.source
        self.largest = largest_batch(sample_rate, len(indices)) if drawing.sampling == "truncated" else None

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
            if self.largest is not None and int(chosen.sum()) > self.largest:
                chosen = self._cut(chosen, source, self.largest)
            drawn = self.indices[chosen][self.ranks.rank :: self.ranks.size].tolist()
            if number > done:
                begun.drew(self.ledger.delivered_of(drawn), drawn)
            elif begun.reads_again:
                begun.drew_again(drawn)
            else:
                continue
            yield drawn
        if not begun.delivers:
            begun.end()

    @staticmethod
    def _cut(chosen: torch.Tensor, source: Any, largest: int) -> torch.Tensor:
        """As many of the chosen ones as fit, each set of them with the same probability."""
        keys = torch.where(chosen, source.uniform(len(chosen)), 2.0)
        return torch.zeros_like(chosen).scatter_(0, keys.argsort()[:largest], True)


class RecordedBatches:
    """Any other batch sampler put into a private loader, an iterable of index lists, with its draws recorded.

    Args:
        batches: the sampler.
        ledger: where draws are recorded.
        once: whether a pass must not have an index twice.
    """

    def __init__(self, batches: Any, ledger: DrawLedger, *, once: bool = False) -> None:
        self.batches = batches
        self.ledger = ledger
        self.once = once

    def __getattr__(self, name: str) -> Any:
        if name == "batches":
            raise AttributeError(name)
        return getattr(self.batches, name)

    def __iter__(self) -> Iterator[list[int]]:
        begun = self.ledger.start()
        seen: set[int] = set()
        for indices in self.batches:
            if self.once:
                _check_new(indices, seen)
            begun.drew(self.ledger.delivered_of(indices), list(indices))
            yield indices
        if not begun.delivers:
            begun.end()

    def __len__(self) -> int:
        return len(self.batches)


def unrecorded(batches: Any) -> Any:
    """A batch sampler without the records that an earlier call has put around it."""
    return batches.batches if isinstance(batches, RecordedBatches) else batches


def _check_new(indices: list[int], seen: set[int]) -> None:
    """No index comes twice in a pass that is accounted once.

    Raises:
        LoaderError: one does.
    """
    before = len(seen)
    seen.update(indices)
    if len(seen) < before + len(indices):
        raise LoaderError(
            "data_loader has a sample twice in one pass with sampling='shuffle'.",
            "A pass is accounted as one release, which is right only if every sample is in one of its batches.",
            "Use shuffle=True without replacement, or sampling='poisson'.",
            path="data_loader",
        )


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
        told = False
        for indices in self.batches:
            parts = self.batches.ledger.parts
            if len(parts) == 1 and len(indices) > self.most and not told:
                told = True
                warn_user(
                    f"a loader that dpfix has not made draws with the sampler of the private one: its batches are whole draws "
                    f"(one of {len(indices)} samples now), not parts of at most {self.most} samples. Iterate over the private "
                    "loader itself (with accelerate, leave it out of prepare)."
                )
            yield from parts

    def __len__(self) -> int:
        rate, samples = getattr(self.batches, "sample_rate", None), getattr(self.batches, "num_samples", 0)
        return len(self.batches) if rate is None else math.ceil(len(self.batches) * rate * samples / self.most)

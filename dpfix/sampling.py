"""Poisson sampling: rate, index set, empty draws, and a ledger of what was drawn."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from opacus.data_loader import DPDataLoader
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, Subset

from dpfix import trees
from dpfix.augmentation import AugmentationMultiplicity
from dpfix.errors import LoaderError
from dpfix.layout import RowCounter
from dpfix.ranks import ALONE, Ranks, digest, new_seed
from dpfix.traceless import rng_untouched

Collate = Callable[[list[Any]], Any]


class DrawLedger:
    """Who drew how many samples, in order: the loader writes it, the optimizer reads it at every step.

    Attributes:
        rounds: counts how often a sampler was started; a new round abandons what an old one left.
        counts: rows of every sample of the delivered batch, where samples may have different numbers of them.
        seed: what the present round is drawn from, where several ranks draw it together.
        number: how many batches of the present round have been begun or, in a BatchMemoryManager, finished.
        at_start: called when a sampler begins a new pass.
    """

    def __init__(self) -> None:
        self.rounds = 0
        self.seed = 0
        self.number = 0
        self.at_start: Callable[[], None] = lambda: None
        self._drawn: deque[int] = deque()
        self._delivered: int | None = None
        self.counts: tuple[int, ...] = ()
        self._delivers = False  # whether the private loader itself hands out this round, or a BatchMemoryManager's

    def start(self, seed: int = 0) -> None:
        """A sampler begins a new pass.

        Args:
            seed: what it is drawn from, on several ranks.
        """
        self.at_start()
        self.rounds += 1
        self.seed, self.number = seed, 0
        self._drawn.clear()
        self._delivered = None
        self._delivers = False
        self.counts = ()

    def drew(self, samples: int) -> None:
        """A logical batch was drawn.

        Args:
            samples: how many samples it holds.
        """
        self._drawn.append(samples)

    def deliver(self, counts: tuple[int, ...] = ()) -> None:
        """The loader hands the oldest drawn batch to the loop.

        Args:
            counts: rows of every sample.
        """
        self.counts = counts
        self._delivered = self._drawn.popleft() if self._drawn else None
        self._delivers = True
        self.number += 1

    def pending(self) -> int | None:
        """Number of samples in the batch the loop is working on, or ``None`` if none was drawn."""
        if self._delivers:
            return self._delivered
        return self._drawn[0] if self._drawn else None

    def settle(self) -> None:
        """The batch was released in a step; it cannot be used again."""
        if self._delivers:
            self._delivered = None
        elif self._drawn:
            self._drawn.popleft()
            self.number += 1


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


@dataclass(frozen=True)
class StandIn:
    """What an empty draw delivers.

    Its gradient never contributes to a release: the step that follows an empty draw consists of noise alone. The model,
    and the loop around it, never see an empty tensor.

    Attributes:
        batch: a batch of one sample.
        counts: the number of its rows, where samples may have different numbers of them.
    """

    batch: Any
    counts: tuple[int, ...] = ()


@dataclass(frozen=True)
class KnownRows:
    """What the loader has to see in every sample, so that its rows are not given to the wrong people.

    Attributes:
        rows: the number that every sample must have, as those of the probe had; ``None`` where they differed.
        counters: places in what the dataset returns that showed the rows of the probe's samples.
    """

    rows: int | None
    counters: tuple[RowCounter, ...]

    def check(self, samples: list[Any]) -> None:
        """Refuse a batch with a sample of another number of rows, or of which it cannot be told.

        Args:
            samples: what the dataset returned, or the views of each sample.

        Raises:
            LoaderError: there is such a sample.
        """
        for sample in samples:
            found = {counter.count(sample) for counter in self.counters}
            if self.rows is None and len(found) > 1:
                raise LoaderError(
                    f"data_loader: it cannot be told whether a sample has {' or '.join(map(str, sorted(found)))} rows: "
                    f"{len(self.counters)} entries of what the dataset returns were as long as the sample has rows in those "
                    "that make_private_safe looked at, and here they differ. Return a list with one entry per row from "
                    "dataset[i] (and flatten it in the collate_fn), or ask for larger batches, of which more samples are "
                    "looked at (up to 4)."
                )
            if self.rows is not None and found != {self.rows}:
                raise LoaderError(
                    f"data_loader: a sample has {max(found - {self.rows})} rows, while those that make_private_safe looked at "
                    f"had {self.rows} each. Which row belongs to whom could not be told any more. Give every sample the same "
                    "number of rows; where they differ among the samples looked at, they are counted for every batch instead."
                )


class CollateOrStandIn:
    """The user's collate function after the views of every sample are made; an empty draw becomes the stand-in.

    Args:
        collate: the user's collate function.
        stand_in: what is delivered for an empty draw.
        augmentation: makes the views of a sample, if that is asked for.
        known_rows: what the loader has to see in every sample, if it has several rows.
    """

    def __init__(
        self,
        collate: Collate,
        stand_in: StandIn,
        augmentation: AugmentationMultiplicity | None,
        known_rows: KnownRows | None = None,
    ) -> None:
        self.collate = collate
        self.stand_in = stand_in
        self.augmentation = augmentation
        self.known_rows = known_rows

    def __call__(self, samples: list[Any]) -> Any:
        """Collate, or deliver the stand-in."""
        return self.collated(self.prepared(samples)) if len(samples) else copy.deepcopy(self.stand_in.batch)

    def prepared(self, samples: list[Any]) -> list[Any]:
        """The samples as they are collated.

        Args:
            samples: what the dataset returned.

        Returns:
            The samples, or a list of views for each.
        """
        made = samples if self.augmentation is None else [self.augmentation.views(s) for s in samples]
        if self.known_rows is not None:
            self.known_rows.check(made)
        return made

    def collated(self, prepared: list[Any]) -> Any:
        """One batch.

        Args:
            prepared: what :meth:`prepared` returned.

        Returns:
            What the user's collate function makes of the samples, or of their views.
        """
        return self.collate(prepared if self.augmentation is None else [view for views in prepared for view in views])


class CountingCollate:
    """Delivers with every batch the number of rows of each of its samples.

    Args:
        inner: collates.
        counter: counts.
    """

    def __init__(self, inner: CollateOrStandIn, counter: RowCounter) -> None:
        self.inner, self.counter = inner, counter

    def __call__(self, samples: list[Any]) -> tuple[Any, tuple[int, ...]]:
        """The batch and its counts."""
        if not len(samples):
            return self.inner(samples), self.inner.stand_in.counts
        prepared = self.inner.prepared(samples)
        return self.inner.collated(prepared), tuple(self.counter.count(item) for item in prepared)


class PrivateDataLoader(DPDataLoader):
    """A loader that draws Poisson batches from the user's dataset and records every draw.

    Args:
        loader: the user's loader.
        stand_in: what an empty draw delivers.
        ledger: where draws are recorded.
        generator: source of randomness; the user's loader's own if ``None``.
        augmentation: makes the views of every sample.
        row_counter: counts the rows of every sample, where they may have different numbers of them.
        known_rows: what the loader has to see in every sample, if it has several rows.
        ranks: the processes that share every batch.
    """

    collate_fn: Any

    def __init__(
        self,
        loader: DataLoader[Any],
        *,
        stand_in: StandIn,
        ledger: DrawLedger,
        generator: torch.Generator | None = None,
        augmentation: AugmentationMultiplicity | None = None,
        row_counter: RowCounter | None = None,
        known_rows: KnownRows | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        indices = index_set(loader)
        self.sample_rate = sample_rate(loader)
        self.distributed = ranks.size > 1
        self.ledger = ledger
        generator = generator if generator is not None else loader.generator
        self.row_counter = row_counter
        sampler = PoissonSampler(
            indices,
            sample_rate=self.sample_rate,
            steps=len(loader),
            generator=ranks.shared_generator(generator) if self.distributed else generator,
            ledger=ledger,
            ranks=ranks,
        )
        # DPDataLoader.__init__ iterates over dataset[0] and wraps collate for empty tensors; neither is wanted.
        DataLoader.__init__(
            self,
            dataset=loader.dataset,
            batch_sampler=sampler,
            collate_fn=CollateOrStandIn(user_collate(loader), stand_in, augmentation, known_rows),
            num_workers=loader.num_workers,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            generator=generator,
            prefetch_factor=loader.prefetch_factor,
            persistent_workers=loader.persistent_workers,
        )

    @property
    def batch_sampler(self) -> Any:
        """The sampler; one put in by someone else is recorded too."""
        sampler = self.__dict__.get("batch_sampler")
        if sampler is None or isinstance(sampler, PoissonSampler):
            return sampler
        return RecordedBatches(sampler, self.ledger)

    @batch_sampler.setter
    def batch_sampler(self, sampler: Any) -> None:
        self.__dict__["batch_sampler"] = sampler

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        if self.row_counter is None:
            for batch in super().__iter__():
                self.ledger.deliver()
                yield batch
            return
        whole = self.collate_fn
        self.collate_fn = CountingCollate(whole, self.row_counter)
        try:
            batches = super().__iter__()  # it takes the collate function with it
        finally:
            self.collate_fn = whole
        for batch, counts in batches:
            self.ledger.deliver(tuple(counts))
            yield batch


def user_collate(loader: DataLoader[Any]) -> Collate:
    """The collate function that a loader was made with.

    Args:
        loader: the user's loader, or a private one.

    Returns:
        The function.
    """
    collate = loader.collate_fn
    return collate.collate if isinstance(collate, CollateOrStandIn) else collate


READS = 6
"""How often a sample is read to tell what is always the same in it; by chance alone a transform is so once in thousands."""


def identity(loader: DataLoader[Any]) -> dict[str, str | bytes]:
    """Who is in the data of a loader, so that ranks can compare it: they share a batch by the places of its samples.

    Args:
        loader: the user's loader.

    Returns:
        Digests by name: of the indices that are drawn from, also inside ``Subset`` and ``DistributedSampler``, and of what
        does not change from one reading to the next in two of the samples.
    """
    indices = index_set(loader)
    found: dict[str, str | bytes] = {"the list of indices to draw from": digest(torch.as_tensor(indices))}
    dataset: Any = loader.dataset
    while isinstance(dataset, Subset):
        found[f"the list of indices of Subset {len(found)}"] = digest(torch.as_tensor(list(dataset.indices)))
        dataset = dataset.dataset
    sampler = getattr(loader.batch_sampler, "sampler", None)
    if isinstance(sampler, DistributedSampler):
        found["the DistributedSampler"] = f"seed {sampler.seed}, epoch {sampler.epoch}, shuffle {sampler.shuffle}"
    for place in (len(indices) // 3, len(indices) - 1):
        with rng_untouched():
            readings = [_constant(loader.dataset[indices[place]]) for _ in range(READS)]
        same = {path: value for path, value in readings[0].items() if all(r.get(path) == value for r in readings)}
        found |= {f"sample {place} of the data, entry {path}": value for path, value in same.items()}
    return found


def _constant(item: Any) -> dict[str, bytes]:
    arrays = ((path, torch.as_tensor(leaf)) for path, leaf in trees.leaves(item) if _is_array(leaf))
    return {str(path): digest(tensor) for path, tensor in arrays}


def _is_array(leaf: Any) -> bool:
    numbers = isinstance(leaf, (bool, int, float)) or (isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biuf")
    return numbers or (isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided)


def views_of(loader: DataLoader[Any]) -> AugmentationMultiplicity | None:
    """What makes the views that a private loader delivers.

    Args:
        loader: the user's loader, or a private one that an earlier call returned.

    Returns:
        ``None`` for a loader of single samples.
    """
    collate = loader.collate_fn
    return collate.augmentation if isinstance(collate, CollateOrStandIn) else None


def index_set(loader: DataLoader[Any]) -> list[int]:
    """The indices a loader draws from.

    Args:
        loader: a loader whose sampler the data-loader rule accepts.

    Returns:
        The sampler's own index set (``SubsetRandomSampler``), or all indices of the dataset.
    """
    batches = loader.batch_sampler
    sampler = batches if hasattr(batches, "indices") else getattr(batches, "sampler", None)
    indices = getattr(sampler, "indices", None)
    if indices is None:
        return list(range(len(loader.dataset)))  # type: ignore[arg-type]
    return [int(i) for i in indices]


def batch_size(loader: DataLoader[Any]) -> float:
    """The batch size a loader asks for, at most the number of samples.

    Args:
        loader: the user's loader.

    Returns:
        The size; for a loader that is already Poisson, the expected size; on several ranks, that of all together: a
        ``DistributedSampler`` says that the loader's size is that of one rank.
    """
    batches = loader.batch_sampler
    population = len(index_set(loader))
    if hasattr(batches, "sample_rate"):
        return batches.sample_rate * population  # type: ignore[union-attr]
    size = getattr(batches, "batch_size", None)
    if size is None:  # only without Poisson sampling: a batch sampler of the user's own
        size = population / max(1, len(loader))
    sampler = getattr(batches, "sampler", None)
    replicas = sampler.num_replicas if isinstance(sampler, DistributedSampler) else 1
    return min(size * replicas, population)


def sample_rate(loader: DataLoader[Any]) -> float:
    """Probability with which every sample enters a batch: batch size over the size of the index set.

    Opacus takes ``1 / len(loader)``, which is off when the last batch is dropped or not full.

    Args:
        loader: the user's loader.

    Returns:
        A number in (0, 1].
    """
    return batch_size(loader) / len(index_set(loader))


def draws_with_replacement(loader: DataLoader[Any]) -> bool:
    """Whether the user's own sampler draws with replacement, which Poisson sampling does not.

    Args:
        loader: the user's loader.

    Returns:
        True for ``RandomSampler(replacement=True)``.
    """
    sampler = getattr(loader.batch_sampler, "sampler", None)
    return isinstance(sampler, RandomSampler) and sampler.replacement

"""The private loader."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from opacus.data_loader import DPDataLoader
from torch.utils.data import DataLoader

from dpfix.distributed import ALONE, Ranks
from dpfix.layout.row_count import RowCounter
from dpfix.sampling.augmentation import AugmentationMultiplicity
from dpfix.sampling.collate import CollateOrPlaceholder, CountingCollate, KnownRows, Placeholder, user_collate
from dpfix.sampling.ledger import DrawLedger
from dpfix.sampling.poisson import PoissonSampler, RecordedBatches
from dpfix.sampling.rate import index_set, sample_rate


class PrivateDataLoader(DPDataLoader):
    """A loader that draws Poisson batches from the user's dataset and records every draw.

    Args:
        loader: the user's loader.
        placeholder: what an empty draw delivers.
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
        placeholder: Placeholder,
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
            collate_fn=CollateOrPlaceholder(user_collate(loader), placeholder, augmentation, known_rows),
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


def views_of(loader: DataLoader[Any]) -> AugmentationMultiplicity | None:
    """What makes the views that a private loader delivers.

    Args:
        loader: the user's loader, or a private one that an earlier call returned.

    Returns:
        ``None`` for a loader of single samples.
    """
    collate = loader.collate_fn
    return collate.augmentation if isinstance(collate, CollateOrPlaceholder) else None

"""The private loader."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from opacus.data_loader import DPDataLoader
from torch.utils.data import DataLoader
from typing_extensions import override

from dpfix.sampling.augmentation import AugmentationMultiplicity
from dpfix.sampling.collate import CollateOrPlaceholder
from dpfix.sampling.poisson import Drawing, PoissonSampler, RecordedBatches
from dpfix.sampling.rate import batch_size, index_set, sample_rate


class PrivateDataLoader(DPDataLoader):
    """A loader that draws Poisson batches from the user's dataset and records every draw.

    Args:
        loader: the user's loader.
        collate: makes a batch of drawn samples.
        drawing: how batches are drawn. The generator of the user's loader only seeds its workers, as it does in torch.
        cryptographic: Opacus's generator in its secure mode, which seeds them instead.

    Attributes:
        nominal: batch size and ``drop_last`` of the user's loader. Scripts count steps with them; draws differ in size.
    """

    collate_fn: Any

    def __init__(
        self,
        loader: DataLoader[Any],
        collate: CollateOrPlaceholder,
        drawing: Drawing,
        cryptographic: torch.Generator | None = None,
    ) -> None:
        self.sample_rate = sample_rate(loader)
        self.nominal = _nominal(loader)
        self.distributed = drawing.ranks.size > 1
        self.ledger = drawing.ledger
        sampler = PoissonSampler(index_set(loader), drawing, sample_rate=self.sample_rate, steps=len(loader))
        # DPDataLoader.__init__ iterates over dataset[0] and wraps collate for empty tensors; neither is wanted.
        DataLoader.__init__(
            self,
            dataset=loader.dataset,
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=loader.num_workers,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            generator=loader.generator if cryptographic is None else cryptographic,
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

    @property
    def batch_size(self) -> int | None:
        """The batch size of the user's loader, about which the draws vary."""
        return self.nominal[0]

    @batch_size.setter
    def batch_size(self, value: Any) -> None:
        pass  # torch's constructor writes None beside a batch sampler, and allows nobody else to write

    @property
    def drop_last(self) -> bool:
        """What the user's loader said; the number of draws in a pass is its number of batches."""
        return self.nominal[1]

    @drop_last.setter
    def drop_last(self, value: Any) -> None:
        pass  # as for batch_size

    @override
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        collate = self.collate_fn
        if not isinstance(collate, CollateOrPlaceholder) or collate.row_counter is None:
            for batch in super().__iter__():
                self.ledger.deliver(batch=batch)
                yield batch
            return
        self.collate_fn = collate.with_counts
        try:
            batches = super().__iter__()  # it takes the collate function with it
        finally:
            self.collate_fn = collate
        for batch, counts in batches:
            self.ledger.deliver(tuple(counts), batch)
            yield batch


def _nominal(loader: DataLoader[Any]) -> tuple[int | None, bool]:
    """Batch size and ``drop_last``; the expected batch size of a loader that Opacus has made Poisson."""
    expected = batch_size(loader) if hasattr(loader.batch_sampler, "sample_rate") else None
    size = loader.batch_size if loader.batch_size is not None or expected is None else round(expected)
    return size, bool(loader.drop_last)


def augmentation_of(loader: DataLoader[Any]) -> AugmentationMultiplicity | None:
    """What makes the views of the samples that a loader delivers; ``None`` unless an earlier call made it private."""
    collate = loader.collate_fn
    return collate.augmentation if isinstance(collate, CollateOrPlaceholder) else None

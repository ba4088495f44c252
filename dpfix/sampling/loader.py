"""The private loader."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import torch
from opacus.data_loader import DPDataLoader
from opacus.utils import batch_memory_manager
from torch.utils.data import DataLoader
from typing_extensions import override

from dpfix.errors import MisuseError
from dpfix.sampling.augmentation import AugmentationMultiplicity
from dpfix.sampling.collate import CollateOrPlaceholder
from dpfix.sampling.one_pass import Pass
from dpfix.sampling.own_loader import deliveries_of
from dpfix.sampling.poisson import Drawing, PhysicalBatches, PoissonSampler, RecordedBatches, unrecorded
from dpfix.sampling.rate import batch_size, how_it_reads, index_set, sample_rate


class PrivateDataLoader(DPDataLoader):
    """A loader that draws Poisson batches from the user's dataset and records every draw.

    Args:
        loader: the user's loader.
        collate: makes a batch of drawn samples.
        drawing: how batches are drawn. The generator of the user's loader only seeds its workers, as it does in torch.
        cryptographic: Opacus's generator in its secure mode, which seeds them instead.

    What it delivers is registered in the ledger by identity, so that a step is made on the draw of its batch in whatever
    order the loop works on batches. A draw that is delivered is accounted, with a step or without one. Draws that workers
    have prepared and that are never delivered, since the loop leaves the pass, are not: nothing was computed from them.

    Attributes:
        nominal: batch size and ``drop_last`` of the user's loader. Scripts count steps with them; draws differ in size.
        most: samples in a physical batch at most; ``None`` where draws are handed out as a whole.
        sampling: how batches are drawn; see :data:`dpfix.scan.options.SAMPLINGS`.
    """

    collate_fn: Any
    most: int | None = None

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
        if self.distributed:  # accelerate's prepare would hand every other draw to another rank
            self._is_accelerate_prepared = True
        self.sharded = drawing.ranks.sharded
        self.ledger = drawing.ledger
        self.sampling = drawing.sampling
        sampler: Any = unrecorded(loader.batch_sampler)
        if self.sampling != "shuffle":
            sampler = PoissonSampler(index_set(loader), drawing, sample_rate=self.sample_rate, steps=len(loader))
        reads = how_it_reads(loader)
        if cryptographic is not None:
            reads["generator"] = cryptographic
        # DPDataLoader.__init__ iterates over dataset[0] and wraps collate for empty tensors; neither is wanted.
        DataLoader.__init__(
            self,
            dataset=loader.dataset,
            batch_sampler=sampler,
            collate_fn=collate,
            **reads,
        )

    @property
    def batch_sampler(self) -> Any:
        """The sampler; one put in by someone else is recorded too."""
        sampler = self.__dict__.get("batch_sampler")
        if sampler is not None and not isinstance(sampler, PoissonSampler):
            sampler = RecordedBatches(sampler, self.ledger, once=self.sampling == "shuffle")
        return sampler if self.most is None else PhysicalBatches(sampler, self.most)

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

    def in_parts(self, most: int) -> PrivateDataLoader:
        """A loader of the same draws that hands them out in parts.

        Args:
            most: samples in a part at most.

        Returns:
            The loader, which shares everything else with this one.

        Raises:
            MisuseError: the ranks have to call the model equally often.
        """
        if self.sharded:
            raise MisuseError(
                f"the batches are to come in parts of {most} samples, and fully_shard was called on the model:",
                "the ranks put layers together at the same calls of the model, and would have different numbers of parts.",
                "Leave BatchMemoryManager out; more ranks, or torch.utils.checkpoint in the model, save memory.",
                path="data_loader",
            )
        parts = copy.copy(self)
        vars(parts).update(most=most, _iterator=None)
        return parts

    def whole(self) -> PrivateDataLoader:
        """A loader of the same draws that hands out each of them as a whole; this one, if it does."""
        if self.most is None:
            return self
        whole = copy.copy(self)
        vars(whole).update(most=None, _iterator=None)
        return whole

    @override
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        collate = self.collate_fn
        counting = isinstance(collate, CollateOrPlaceholder) and collate.row_counter is not None
        begun = self.ledger.expect(self.most)
        try:
            if counting:
                self.collate_fn = collate.with_counts
            try:
                with self.ledger.position.seeding_workers(self, begun):
                    batches = super().__iter__()  # it takes the collate function with it
            finally:
                self.collate_fn = collate
            for made in batches:
                if begun.read_again():
                    continue
                yield self._delivered(begun, made, counting)
                yield from self._again(begun, collate.with_counts if counting else collate, counting)
        finally:
            begun.end()

    def _again(self, begun: Pass, collate: Any, counting: bool) -> Iterator[Any]:
        """Draws that are begun again, because memory ran out; nobody has read their samples ahead."""
        while parts := self.ledger.again(begun):
            reads = {"pin_memory": self.pin_memory, "generator": torch.Generator()}
            for made in DataLoader(self.dataset, batch_sampler=parts, collate_fn=collate, **reads):
                yield self._delivered(begun, made, counting)
                if begun.asked:
                    break

    @staticmethod
    def _delivered(begun: Pass, made: Any, counting: bool) -> Any:
        batch, counts = made if counting else (made, ())
        begun.deliver(batch, tuple(counts))
        return batch


def _nominal(loader: DataLoader[Any]) -> tuple[int | None, bool]:
    """Batch size and ``drop_last``; the expected batch size of a loader that Opacus has made Poisson."""
    expected = batch_size(loader) if hasattr(loader.batch_sampler, "sample_rate") else None
    size = loader.batch_size if loader.batch_size is not None or expected is None else round(expected)
    return size, bool(loader.drop_last)


def augmentation_of(loader: DataLoader[Any]) -> AugmentationMultiplicity | None:
    """What makes the views of the samples that a loader delivers; ``None`` unless an earlier call made it private."""
    collate = loader.collate_fn
    return collate.augmentation if isinstance(collate, CollateOrPlaceholder) else None


def split_by_draws() -> None:
    """From now on Opacus's ``BatchMemoryManager`` splits a private loader in the loader's own way.

    Opacus makes a loader of its own around the private one's sampler, and tells the optimizer beforehand which steps complete
    a batch. A physical batch that the loop leaves out then shifts all that follow, and samples of two draws are released as
    one. The private loader's physical batches know their draw instead. What Opacus does with other loaders stays as it is.
    """
    opacus = batch_memory_manager.wrap_data_loader
    if hasattr(opacus, "__wrapped__"):
        return

    @functools.wraps(opacus)
    def wrap_data_loader(*, data_loader: Any, max_batch_size: int, optimizer: Any) -> Any:
        if isinstance(data_loader, PrivateDataLoader):
            return data_loader.in_parts(max_batch_size)
        parts = opacus(data_loader=data_loader, max_batch_size=max_batch_size, optimizer=optimizer)
        told = deliveries_of(data_loader)
        return parts if told is None else told.of(parts)

    batch_memory_manager.wrap_data_loader = wrap_data_loader

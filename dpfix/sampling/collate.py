"""What the loader delivers: collated samples or their views, and a placeholder for an empty draw."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, get_worker_info

from dpfix.errors import LoaderError
from dpfix.layout.row_count import RowCounter
from dpfix.sampling.augmentation import AugmentationMultiplicity
from dpfix.sampling.ledger import DrawLedger

Collate = Callable[[list[Any]], Any]


@dataclass(frozen=True)
class Placeholder:
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
    """What every sample is checked for, so that no row is counted as another sample's.

    Attributes:
        rows: the number that every sample must have, as those of the probe had; ``None`` where they differed.
        counters: entries of what the dataset returns whose length was the number of rows of the probe's samples.
    """

    rows: int | None
    counters: tuple[RowCounter, ...]

    def check(self, samples: list[Any]) -> None:
        """Refuse a sample with another number of rows, or one whose number of rows is ambiguous.

        Args:
            samples: what the dataset returned, or the views of each sample.

        Raises:
            LoaderError: there is such a sample in the batch.
        """
        for sample in samples:
            found = {counter.count(sample) for counter in self.counters}
            if self.rows is None and len(found) > 1:
                raise LoaderError(
                    f"data_loader: it cannot be told whether a sample has {' or '.join(map(str, sorted(found)))} rows: "
                    f"{len(self.counters)} entries of what the dataset returns were as long as the sample has rows in those "
                    "that make_private_safe looked at, and here they differ.",
                    help="Return a list with one entry per row from dataset[i] (and flatten it in the collate_fn), or ask for "
                    "larger batches, of which more samples are looked at (up to 4).",
                    path="data_loader",
                )
            if self.rows is not None and found != {self.rows}:
                raise LoaderError(
                    f"data_loader: a sample has {max(found - {self.rows})} rows, while those that make_private_safe looked at "
                    f"had {self.rows} each.",
                    "Which row belongs to whom could not be told any more.",
                    "Give every sample the same number of rows; where they differ among the samples looked at, they are counted "
                    "for every batch instead.",
                    path="data_loader",
                )


@dataclass(frozen=True, eq=False)
class CollateOrPlaceholder:
    """The user's collate function, called with the views of the samples; an empty draw becomes the placeholder batch.

    Attributes:
        collate: the user's collate function.
        placeholder: what an empty draw delivers.
        augmentation: makes the views of a sample, if any are asked for.
        known_rows: what every sample is checked for, where samples have several rows.
        row_counter: counts the rows of a sample, where samples may have different numbers of them.
        ledger: learns what was made of a draw that somebody else's loader hands out.
        look: calls the collate function on prepared samples, and looks at what it makes of them.
    """

    collate: Collate
    placeholder: Placeholder
    augmentation: AugmentationMultiplicity | None = None
    known_rows: KnownRows | None = None
    row_counter: RowCounter | None = None
    ledger: DrawLedger | None = None
    look: Callable[[Collate, list[Any]], Any] | None = None

    def __call__(self, samples: list[Any]) -> Any:
        """The batch of some samples, or the placeholder's."""
        batch = self.collated(self.prepared(samples)) if len(samples) else copy.deepcopy(self.placeholder.batch)
        if self.ledger is not None and get_worker_info() is None:
            self.ledger.collated(batch)
        return batch

    def with_counts(self, samples: list[Any]) -> tuple[Any, tuple[int, ...]]:
        """The batch of some samples, and the number of rows of each."""
        assert self.row_counter is not None
        if not len(samples):
            return self(samples), self.placeholder.counts
        prepared = self.prepared(samples)
        return self.collated(prepared), tuple(self.row_counter.count(item) for item in prepared)

    def prepared(self, samples: list[Any]) -> list[Any]:
        """What the dataset returned for every sample or, if views are asked for, a list of their rows."""
        made = samples if self.augmentation is None else [self.augmentation.views(s) for s in samples]
        if self.known_rows is not None:
            self.known_rows.check(made)
        return made

    def collated(self, prepared: list[Any]) -> Any:
        """The batch that the user's collate function makes of prepared samples."""
        make = self.collate if self.augmentation is None else self._of_views
        return make(prepared) if self.look is None else self.look(make, prepared)

    def _of_views(self, prepared: list[Any]) -> Any:
        return self.collate([row for rows in prepared for row in rows])


def user_collate(loader: DataLoader[Any]) -> Collate:
    """The collate function that a loader was made with, also that of a private loader."""
    collate = loader.collate_fn
    return collate.collate if isinstance(collate, CollateOrPlaceholder) else collate

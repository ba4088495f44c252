"""What the loader delivers: collated samples or their views, and a stand-in for an empty draw."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader

from dpfix.errors import LoaderError
from dpfix.layout.row_count import RowCounter
from dpfix.sampling.augmentation import AugmentationMultiplicity

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


class CollateOrPlaceholder:
    """The user's collate function after the views of every sample are made; an empty draw becomes the stand-in.

    Args:
        collate: the user's collate function.
        placeholder: what is delivered for an empty draw.
        augmentation: makes the views of a sample, if that is asked for.
        known_rows: what the loader has to see in every sample, if it has several rows.
    """

    def __init__(
        self,
        collate: Collate,
        placeholder: Placeholder,
        augmentation: AugmentationMultiplicity | None,
        known_rows: KnownRows | None = None,
    ) -> None:
        self.collate = collate
        self.placeholder = placeholder
        self.augmentation = augmentation
        self.known_rows = known_rows

    def __call__(self, samples: list[Any]) -> Any:
        """Collate, or deliver the stand-in."""
        return self.collated(self.prepared(samples)) if len(samples) else copy.deepcopy(self.placeholder.batch)

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

    def __init__(self, inner: CollateOrPlaceholder, counter: RowCounter) -> None:
        self.inner, self.counter = inner, counter

    def __call__(self, samples: list[Any]) -> tuple[Any, tuple[int, ...]]:
        """The batch and its counts."""
        if not len(samples):
            return self.inner(samples), self.inner.placeholder.counts
        prepared = self.inner.prepared(samples)
        return self.inner.collated(prepared), tuple(self.counter.count(item) for item in prepared)


def user_collate(loader: DataLoader[Any]) -> Collate:
    """The collate function that a loader was made with.

    Args:
        loader: the user's loader, or a private one.

    Returns:
        The function.
    """
    collate = loader.collate_fn
    return collate.collate if isinstance(collate, CollateOrPlaceholder) else collate

"""A data set without one of its records, or with another in its place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Change:
    """How a neighbouring data set differs.

    A record that is left out is no part of any batch; another one is read where it would have been. So generators that a data
    set draws from go on as they would have, and what a data set remembers of its reads does not hold the record either.

    Attributes:
        record: the index that it is about.
        other: the index of the record that is read in its place.
        left_out: whether that one is dropped.
    """

    record: int
    other: int
    left_out: bool

    @property
    def kind(self) -> str:
        """What is done to the record."""
        return "left out" if self.left_out else "exchanged"

    def delivered_of(self, indices: Sequence[int]) -> int:
        """How many samples a draw delivers."""
        return sum(index != self.record for index in indices) if self.left_out else len(indices)


class Neighbour:
    """The data set that a loader reads in the place of its own.

    Args:
        dataset: the script's.
        change: how this one differs.
    """

    def __init__(self, dataset: Any, change: Change) -> None:
        self.dataset, self.change = dataset, change

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name in {"dataset", "change"}:
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __getitem__(self, index: Any) -> Any:
        return self.dataset[self._read(index)]

    def __getitems__(self, indices: Sequence[Any]) -> list[Any]:
        """The records of a batch; the loader asks for them in this way."""
        read = [self._read(index) for index in indices]
        several = getattr(self.dataset, "__getitems__", None)
        items = [self.dataset[index] for index in read] if several is None else several(read)
        if not self.change.left_out:
            return items
        return [item for item, index in zip(items, indices, strict=True) if index != self.change.record]

    def _read(self, index: Any) -> Any:
        return self.change.other if index == self.change.record else index

"""The records that a loader draws from, remembered without keeping the data alive."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sized
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, DataLoader, StackDataset, Subset

from dpfix.errors import USER_CODE_ERRORS
from dpfix.instrument.rng import rng_untouched
from dpfix.sampling.fingerprint import READS, constants
from dpfix.sampling.people import People, items_behind, people_of
from dpfix.sampling.ranks import digest
from dpfix.sampling.rate import index_set
from dpfix.sampling.records import looks_up_as


class Population:
    """The records that a loader draws from, so that a later loader can be compared.

    Holds index sets and weak references to the data sets below torch's wrappers. Nothing is read before a comparison needs it.

    Args:
        loader: a loader over a data set with a length.

    Attributes:
        units: digests of who has which items, by index and by name; none if nobody has several.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        people, indices = people_of(loader), np.asarray(index_set(loader))
        whose, self.units = indices, ()
        if people is not None:
            indices, whose = people.indices_and_persons(indices)
            self.units = _units(people, indices, whose)
        self._items, self._persons = len(np.unique(indices)), people is not None
        self._parts = [_Part(*part) for part in _parts(items_behind(loader.dataset), indices, whose)]

    @property
    def units_of_all(self) -> tuple[str, ...]:
        """As ``units``, where persons are drawn and every record is; else none: those of a fold say nothing of another fold."""
        return (self.units or ("alone",)) if self._persons and self._items == self.samples else ()

    @property
    def samples(self) -> int:
        """Records of the data sets below torch's wrappers, drawn or not."""
        lengths = {id(part.dataset()) if part.dataset() is not None else part: part.kind[1] for part in self._parts}
        return sum(length or 0 for length in lengths.values())

    def overlaps(self, other: Population) -> bool:
        """Whether some record may be in both.

        Data sets are the same if they are one object, or if length, class and the samples that are compared agree, as in a
        data set that a script makes twice. One that is gone cannot be compared and counts as the same if length and class do.

        Returns:
            ``False`` only if no record is known to both.
        """
        return any(mine.shares(its) for mine in self._parts for its in other._parts)

    def same_data_as(self, other: Population) -> bool:
        """As :meth:`overlaps`, whichever records of a data set are drawn."""
        return any(mine.of_same(its) for mine in self._parts for its in other._parts)

    def splits_a_unit_of(self, other: Population) -> bool:
        """Whether what is one unit of another population (a person) is several of this one.

        Returns:
            ``True`` if what was accounted for these says too little about that one; ``False`` where no record is in both.
        """
        return any(mine.splits(its) for mine in self._parts for its in other._parts)


def _units(people: People, indices: np.ndarray, whose: np.ndarray) -> tuple[str, ...]:
    """Digests by which the same persons are known again in another process: one holds if the data set keeps its order.

    Numbers from 0 on are no names: they are counted in the order of the data set.

    Returns:
        The digests; none if nobody has several items.
    """
    order = np.argsort(indices, kind="stable")
    persons, first, of, items = np.unique(whose[order], return_index=True, return_inverse=True, return_counts=True)
    if len(persons) == len(indices):
        return ()
    numbered = np.argsort(np.argsort(first))[of]  # by the first item of each
    by_index = digest(torch.from_numpy(np.stack([indices[order], numbered]).astype(np.int64))).hex()
    names = [people.names[person] for person in persons]
    if {type(name) for name in names} == {int} and set(names) == set(range(len(names))):
        return (by_index,)
    named = "\n".join(sorted(f"{name!r} {count}" for name, count in zip(names, items, strict=True)))
    return by_index, digest(torch.frombuffer(bytearray(named.encode()), dtype=torch.uint8)).hex()


class _Part:
    """A data set that is no wrapper of torch's, and the indices of it that are drawn."""

    def __init__(self, dataset: Any, indices: np.ndarray, whose: np.ndarray) -> None:
        self.dataset = _weak(dataset)
        self.kind = type(dataset).__qualname__, len(dataset) if isinstance(dataset, Sized) else None
        drawn = np.unique(indices)
        self._drawn = None if len(drawn) == self.kind[1] else drawn  # all of a large data set need no list
        units = np.unique(whose)
        first = np.unique(indices, return_index=True)[1]
        self._whose = whose[first] if len(units) < len(whose) else None  # nobody has several items

    @property
    def indices(self) -> np.ndarray:
        return np.arange(self.kind[1] or 0) if self._drawn is None else self._drawn

    def shares(self, other: _Part) -> bool:
        return bool(np.isin(self.indices, other.indices).any()) and self._same(other)

    def of_same(self, other: _Part) -> bool:
        """Whether both are of one data set."""
        return bool(len(self.indices) and len(other.indices)) and self._same(other)

    def splits(self, other: _Part) -> bool:
        """Whether two items of one unit of the other part belong to two units here."""
        if other._whose is None or not self.shares(other):
            return False
        _, here, there = np.intersect1d(self.indices, other.indices, assume_unique=True, return_indices=True)
        mine = here if self._whose is None else self._whose[here]
        pairs = np.unique(np.stack([other._whose[there], mine], 1), axis=0)
        return len(pairs) > len(np.unique(other._whose[there]))

    def _same(self, other: _Part) -> bool:
        mine, its = self.dataset(), other.dataset()
        if mine is not None and its is not None:
            return mine is its or (self.kind == other.kind and _same_content(mine, its, self.indices))
        return self.kind == other.kind


def _weak(dataset: Any) -> Callable[[], Any]:
    try:
        return weakref.ref(dataset)
    except TypeError:  # a list, say
        return lambda: None


def _parts(dataset: Any, indices: np.ndarray, whose: np.ndarray) -> Iterator[tuple[Any, np.ndarray, np.ndarray]]:
    """The data sets below torch's wrappers, each with those of its indices that these indices stand for, and whose they are."""
    if hasattr(dataset, "__len__"):
        indices = np.where(indices < 0, indices + len(dataset), indices)
    if looks_up_as(dataset, Subset) and _whole(dataset.indices):
        yield from _parts(dataset.dataset, np.asarray(dataset.indices)[indices], whose)
    elif looks_up_as(dataset, ConcatDataset):
        ends = np.asarray(dataset.cumulative_sizes)
        of = np.searchsorted(ends, indices, side="right")
        for number, part in enumerate(dataset.datasets):
            its = of == number
            yield from _parts(part, indices[its] - (ends[number - 1] if number else 0), whose[its])
    elif looks_up_as(dataset, StackDataset):
        parts: Any = dataset.datasets
        for part in parts.values() if isinstance(parts, dict) else parts:
            yield from _parts(part, indices, whose)
    else:
        yield dataset, indices, whose


def _whole(indices: Any) -> bool:
    """Whether all are whole numbers; a ``Subset`` of a mapping may have keys of another kind."""
    return np.asarray(indices).dtype.kind in "iu"


def _same_content(one: Any, other: Any, indices: np.ndarray) -> bool:
    """Whether what never changes in some samples is the same in two data sets; unknown counts as the same."""
    for index in {int(indices[0]), int(indices[len(indices) // 2]), int(indices[-1])}:
        try:
            with rng_untouched():
                mine, its = constants(one, index, READS), constants(other, index, READS)
        except USER_CODE_ERRORS:
            continue
        if any(mine[path] != its[path] for path in mine.keys() & its.keys()):
            return False
    return True

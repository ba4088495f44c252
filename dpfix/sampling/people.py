"""Persons as samples: the items of a person are drawn together, averaged, and clipped as one."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    StackDataset,
    Subset,
    SubsetRandomSampler,
)
from typing_extensions import override

from dpfix.errors import ArgumentError
from dpfix.layout.row_count import UnitItems
from dpfix.report.statement import UNIT
from dpfix.sampling.rate import how_it_reads, index_set
from dpfix.sampling.records import record
from dpfix.sampling.seen_items import SeenItems, changed_places
from dpfix.sampling.unit_names import Names, NoNameError, check_unchanged


class People(Dataset[UnitItems]):
    """Persons: an item is the list of a person's items, all of them or some that are drawn whenever the person is.

    Args:
        dataset: the data set that the items are in.
        indices: the indices that are drawn from.
        names: who each of them belongs to.
        most: items of a person at a time; all if not given.

    Attributes:
        words: how persons were named.
        names: of all persons.
    """

    def __init__(self, dataset: Any, indices: Sequence[int], names: Names, most: int | None = None) -> None:
        numbers: dict[Hashable, int] = {}
        whose = np.fromiter((numbers.setdefault(n, len(numbers)) for n in names.of_items), np.int64, len(indices))
        order = np.argsort(whose, kind="stable")
        self.dataset, self.words, self.most, self.names = dataset, names.words, most, list(numbers)
        self._told_by, self._seen = names.told_by, SeenItems()
        self._indices, self._whose = np.asarray(indices, np.int64)[order], whose[order]
        self._ends = np.cumsum(np.bincount(whose, minlength=len(numbers)))

    def __len__(self) -> int:
        return len(self.names)

    @override
    def __getitem__(self, index: int) -> UnitItems:
        indices = self.items_of(index)
        if self.most is not None and len(indices) > self.most:
            indices = indices[torch.randperm(len(indices))[: self.most].numpy()]
        chosen = indices.tolist()
        together = getattr(self.dataset, "__getitems__", None)  # as torch's loader reads the items of a batch
        items = UnitItems(together(chosen) if together else (self.dataset[i] for i in chosen))
        for i, item in zip(chosen, items, strict=self._told_by is not None):
            self._check_owner(i, index, item)
        return items

    def _check_owner(self, index: int, person: int, item: Any) -> None:
        """The item still belongs to the person: it says so, or is not what an index of another one was before."""
        now = self._now(item)
        if now is not None:
            check_unchanged(index, self.names[person], now)
            return
        before = self._seen.moved_from(index, item)
        if before is not None and (former := self._person[before]) != person:
            raise changed_places(index, self.names[person], before, self.names[former])

    @cached_property
    def _person(self) -> dict[int, int]:
        return dict(zip(self._indices.tolist(), self._whose.tolist(), strict=True))

    def read_beforehand(self) -> None:
        """Remember some items, for workers that begin anew in every pass; where items tell whose they are, nothing is read."""
        if self._told_by is None:
            self._seen.read(self.dataset, self._indices)  # type: ignore[arg-type]

    def _now(self, item: Any) -> Hashable:
        try:
            return self._told_by(item) if self._told_by is not None else None
        except NoNameError as error:
            return str(error)

    def items_of(self, person: int) -> np.ndarray:
        """Indices of the items of a person."""
        return self._indices[self._ends[person - 1] if person else 0 : self._ends[person]]

    @property
    def indices(self) -> list[int]:
        """Indices of all items that are drawn from, person by person."""
        return self._indices.tolist()

    def given(self, dataset: Any, indices: Sequence[int]) -> Names:
        """The names that it was made of, for the same indices of the same data set."""
        names = dict(zip(self._indices.tolist(), (self.names[n] for n in self._whose), strict=True))
        return Names([names[i] for i in indices], self.words, self._told_by)

    @property
    def sizes(self) -> np.ndarray:
        """How many items every person has."""
        return np.diff(self._ends, prepend=0)

    @property
    def items(self) -> int:
        """How many items all persons have."""
        return len(self._indices)

    def indices_and_persons(self, persons: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The indices of the items of some persons, and whose each of them is."""
        of_these = np.isin(self._whose, persons)
        return self._indices[of_these], self._whose[of_these]

    def same_persons(self, other: People) -> bool:
        """Whether another one has the same items by the same persons."""
        return (
            self.dataset is other.dataset
            and np.array_equal(self._indices, other._indices)
            and np.array_equal(self._whose, other._whose)
        )

    def for_probe(self, order: Sequence[int], wanted: int) -> list[int]:
        """Persons to try everything on: not those with most items, and two with different numbers if there are such.

        Args:
            order: persons, in the order in which they would be taken.
            wanted: how many.

        Returns:
            Their numbers.
        """
        sizes = self.sizes if self.most is None else np.minimum(self.sizes, self.most)
        few = [person for person in order if sizes[person] <= np.median(sizes)] or list(order)
        chosen = [few[i % len(few)] for i in range(wanted)]
        others = [person for person in order if sizes[person] != sizes[chosen[0]]]
        if others and len({int(sizes[person]) for person in chosen}) == 1:
            chosen[-1] = min(others, key=lambda person: sizes[person])
        return chosen

    def describe(self) -> str:
        """How many items persons have, in words."""
        few, many = int(self.sizes.min()), int(self.sizes.max())
        return f"{self.items} items, {few if few == many else f'{few} to {many}'} each"


@dataclass(frozen=True)
class Flattened:
    """A collate function that gets the items of all persons as one list.

    Attributes:
        collate: the script's.
    """

    collate: Callable[[list[Any]], Any]

    def __call__(self, samples: list[Any]) -> Any:
        """The batch of the items of some persons."""
        return self.collate([
            item for sample in samples for item in (sample if isinstance(sample, UnitItems) else [sample])
        ])


def people_of(loader: DataLoader[Any]) -> People | None:
    """The persons that a loader draws; ``None`` if it draws items."""
    return loader.dataset if isinstance(loader.dataset, People) else None


def unit_of(loader: DataLoader[Any]) -> str:
    """What a loader draws, in a word."""
    return "sample" if people_of(loader) is None else "person"


def unit_in_words(loader: DataLoader[Any]) -> str:
    """Whose privacy a training on a loader is about."""
    people = people_of(loader)
    return UNIT if people is None else f"one person with all items ({people.words})"


def items_behind(dataset: Any) -> Any:
    """The data set of the items of persons; any other data set as it is."""
    return dataset.dataset if isinstance(dataset, People) else dataset


def loader_of_people(loader: DataLoader[Any], names: Callable[[Any, Sequence[int]], Names], most: Any) -> Any:
    """A loader that draws persons in the place of one that draws their items.

    Args:
        loader: the script's loader; its batch size becomes the number of persons in a batch.
        names: tells whose the items of a data set are.
        most: items of a person at a time, or ``None``.

    Returns:
        The loader, over :class:`People`.

    Raises:
        ArgumentError: names are missing, an item belongs to several persons, or nobody has so many items.
    """
    indices = index_set(loader)
    found = names(loader.dataset, indices)
    _check_own(loader.dataset, indices, found.of_items)
    people = People(loader.dataset, indices, found, most)
    if most is not None and most > people.sizes.max():
        raise ArgumentError(
            f"items_per_unit={most}, and nobody has more than {people.sizes.max()} items ({len(people)} persons, "
            f"{people.describe()}).",
            "No person would ever be cut to that number.",
            "Leave items_per_unit out, or pass a smaller number.",
            path="items_per_unit",
        )
    if loader.num_workers:
        people.read_beforehand()
    batches: Any = loader.batch_sampler  # a loader that was given one has no batch size itself
    return DataLoader(
        people,
        batch_size=batches.batch_size,
        sampler=_sampler(batches.sampler, people),
        drop_last=batches.drop_last,
        collate_fn=Flattened(loader.collate_fn),
        **how_it_reads(loader),
    )


def _check_own(dataset: Any, indices: Sequence[int], names: Sequence[Hashable]) -> None:
    """A record that several indices stand for belongs to one person.

    Raises:
        ArgumentError: it belongs to two, whose gradients would both hold it.
    """
    if len(set(indices)) == len(indices) and not isinstance(dataset, (Subset, ConcatDataset, StackDataset)):
        return
    owners: dict[Hashable, tuple[int, Hashable]] = {}
    for index, name in zip(indices, names, strict=True):
        other, owner = owners.setdefault(record(dataset, index), (index, name))
        if owner != name:
            raise ArgumentError(
                f"privacy_unit: the indices {other} and {index} stand for one record, which belongs to {owner!r} by the one and "
                f"to {name!r} by the other.",
                "Two persons' gradients would hold it, so that it could move the released sum by two clip norms.",
                "Give both indices one name; whoever shares records is one unit.",
                path="privacy_unit",
            )


def _sampler(given: Any, people: People) -> Sampler[int]:
    """A sampler of persons like the script's sampler of items."""
    if isinstance(given, DistributedSampler):
        return DistributedSampler(people, given.num_replicas, given.rank, given.shuffle, given.seed, given.drop_last)
    if isinstance(given, RandomSampler):
        return RandomSampler(people, given.replacement, given._num_samples, given.generator)
    if isinstance(given, SubsetRandomSampler):
        return RandomSampler(people, generator=given.generator)
    return SequentialSampler(people)


KNOWN_SAMPLERS = (RandomSampler, SequentialSampler, SubsetRandomSampler, DistributedSampler)
"""Samplers that draw items in a way in which persons can be drawn."""

"""Which record of which data set an index stands for."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Hashable, Sized
from dataclasses import dataclass
from typing import Any

from torch.utils.data import ConcatDataset, DataLoader, StackDataset, Subset

from dpfix.sampling.rate import index_set


def record(dataset: Any, index: Any) -> Hashable:
    """What an index of a data set stands for, followed through torch's wrappers.

    Args:
        dataset: a data set, or a ``Subset``, ``ConcatDataset`` or ``StackDataset`` of others.
        index: an index of it.

    Returns:
        Equal for two indices if these wrappers lead both to one index of one data set.
    """
    while True:
        if looks_up_as(dataset, Subset) and hasattr(dataset, "indices"):
            dataset, index = dataset.dataset, dataset.indices[index]
        elif looks_up_as(dataset, ConcatDataset):
            index = _from_the_front(dataset, index)
            part = bisect.bisect_right(dataset.cumulative_sizes, index)
            index -= dataset.cumulative_sizes[part - 1] if part else 0
            dataset = dataset.datasets[part]
        elif looks_up_as(dataset, StackDataset):
            parts: Any = dataset.datasets
            return tuple(record(part, index) for part in (parts.values() if isinstance(parts, dict) else parts))
        else:
            return id(dataset), _hashable(_from_the_front(dataset, index))


def looks_up_as(dataset: Any, kind: type[Any]) -> bool:
    """Whether a data set finds its items as one of torch's wrappers does; a subclass may do so in its own way."""
    return isinstance(dataset, kind) and type(dataset).__getitem__ is kind.__getitem__


def _hashable(index: Any) -> Hashable:
    return index if isinstance(index, Hashable) else repr(index)


@dataclass(frozen=True)
class Repeated:
    """The records that an index set names several times.

    Attributes:
        records: how many they are.
        times: how often the one that is named most often is named.
        indices: the indices that name that one.
    """

    records: int
    times: int
    indices: list[int]


def repeated(loader: DataLoader[Any]) -> Repeated | None:
    """The records that the index set of a loader names several times.

    Args:
        loader: a loader over a data set with a length.

    Returns:
        Those records, or ``None`` if every record is named once.
    """
    indices = index_set(loader)
    once = len(set(indices)) == len(indices) and min(indices, default=0) >= 0
    if once and not isinstance(loader.dataset, (Subset, ConcatDataset, StackDataset)):
        return None
    records = [record(loader.dataset, index) for index in indices]
    several = [(one, times) for one, times in Counter(records).items() if times > 1]
    if not several:
        return None
    most, times = max(several, key=lambda pair: pair[1])
    return Repeated(len(several), times, [i for i, one in zip(indices, records, strict=True) if one == most])


def _from_the_front(dataset: Any, index: Any) -> Any:
    """An index as a number that does not count from the end; a key of another kind as it is."""
    if not hasattr(index, "__index__"):
        return index
    number = index.__index__()
    return number + len(dataset) if number < 0 and isinstance(dataset, Sized) else number

"""How many rows a sample has, where these are not the same for all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dpfix.instrument import pytree


class UnitItems(list[Any]):
    """The items of one person, which are one sample: what a dataset returns for each of several indices.

    Attributes:
        rows: how many rows they become; an item that is a list of rows already becomes so many.
    """

    @property
    def rows(self) -> int:
        """See the class."""
        return sum(len(item) if is_rows(item) else 1 for item in self)

    def one_row(self) -> UnitItems:
        """The same with a single row: of whatever is made of it, one row is made of every row."""
        return UnitItems([self[0][:1] if is_rows(self[0]) else self[0]])


def is_rows(item: Any) -> bool:
    """Whether what a dataset returns for an index is a list of rows already, as MONAI's random crops return them.

    Returns:
        True for a list of mappings; a list ``[image, label]`` is a single row.
    """
    return isinstance(item, list) and bool(item) and all(isinstance(row, Mapping) for row in item)


@dataclass(frozen=True)
class RowCounter:
    """Tells how many rows a sample has from what the dataset returns for it.

    Attributes:
        path: path of a list, a tuple, a tensor or an array in it.
        dim: dimension of the tensor or array; 0 for a list or tuple.
    """

    path: pytree.Path
    dim: int = 0

    def count(self, item: Any) -> int:
        """Number of rows of a sample.

        Args:
            item: what the dataset returns.

        Returns:
            The number; 0 if the sample has another structure.
        """
        for key in self.path:
            found = dict(pytree.children(item) or ())
            if key not in found:
                return 0
            item = found[key]
        sizes = _sizes(item)
        return sizes[self.dim] if self.dim < len(sizes) else 0


def find_row_counters(items: Sequence[Any], counts: tuple[int, ...]) -> list[RowCounter]:
    """Where a dataset's items hold the number of rows that they become.

    Args:
        items: samples, as the dataset returns them.
        counts: rows of each in a batch.

    Returns:
        All places with these numbers; lists and first dimensions come first.
    """
    told = isinstance(items[0], UnitItems)  # by the loader itself; what else is as long is so by chance
    parts = [((), items[0])] if told else _parts(items[0])
    places = [RowCounter(path, dim) for path, part in parts for dim in range(len(_sizes(part)))]
    found = [c for c in places if tuple(c.count(item) for item in items) == counts]
    return sorted(found, key=lambda c: c.dim)


def _parts(tree: Any, path: pytree.Path = ()) -> Iterator[tuple[pytree.Path, Any]]:
    yield path, tree
    for key, part in pytree.children(tree) or ():
        yield from _parts(part, (*path, key))


def _sizes(part: Any) -> tuple[int, ...]:
    if isinstance(part, (torch.Tensor, np.ndarray)):
        return tuple(part.shape)
    if isinstance(part, UnitItems):
        return (part.rows,)
    return (len(part),) if isinstance(part, (list, tuple)) else ()


def row_counts(together: Sequence[Any], alone: Sequence[Sequence[Any]]) -> tuple[int, ...]:
    """Rows of every sample in the model's inputs, where these are not the same for all.

    Args:
        together: calls of the model in the step on the batch.
        alone: the same for every sample alone.

    Returns:
        The numbers in the first tensor of that kind; empty if there is none.
    """
    for number, call in enumerate(together):
        parts = [pytree.tensors((calls[number].args, calls[number].kwargs)) for calls in alone if number < len(calls)]
        for place, whole in enumerate(pytree.tensors((call.args, call.kwargs))):
            shapes = [p[place].shape for p in parts if place < len(p)]
            if len(shapes) < len(alone) or any(len(s) != whole.dim() for s in shapes):
                continue
            for dim in range(whole.dim()):
                sizes = tuple(s[dim] for s in shapes)
                if len(set(sizes)) > 1 and sum(sizes) == whole.shape[dim]:
                    return sizes
    return ()

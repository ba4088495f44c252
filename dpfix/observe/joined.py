"""The probe without the loader's collate function, which is the script's code and not to be called inside a training step.

Where a batch is nothing but its samples one after another, batches are put together from those of single samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dpfix.instrument import pytree
from dpfix.observe.call_rows import Dims, dims_in_batch
from dpfix.observe.probe import Probe

ROOT = "batch"
"""Key of the batch in a sample of such a probe."""


class NotJoinedError(Exception):
    """A batch is more than its samples one after another; caught where batches are joined."""


@dataclass(frozen=True)
class Joint:
    """How batches of single samples are put together.

    Attributes:
        like: what a batch of some samples holds.
        dims: the dimension that carries the samples, by the path of a tensor.
        total: the number of rows of that batch: one for every sample, or for every item of a person.
        padding: by the path of a tensor, what shorter ones are filled up with, and whether at their end.
    """

    like: Any
    dims: Dims
    total: int
    padding: Mapping[pytree.Path, tuple[float, bool]] = field(default_factory=dict)

    def tensor(self, parts: Sequence[torch.Tensor], path: pytree.Path) -> torch.Tensor:
        """A tensor of the batch of those of its samples.

        Returns:
            The tensor.

        Raises:
            NotJoinedError: they do not fit together.
        """
        first, dim = parts[0], self.dims.get(path)
        if dim is None and all(torch.equal(p, first) for p in parts):
            return first
        if dim is None or any(p.dim() != first.dim() for p in parts):
            raise NotJoinedError
        sizes = [max(p.shape[d] for p in parts) for d in range(first.dim())]
        shapes = [[p.shape[d] if d == dim else size for d, size in enumerate(sizes)] for p in parts]
        if path in self.padding:
            fill, at_end = self.padding[path]
            filled = [p.new_full(shape, fill) for p, shape in zip(parts, shapes, strict=True)]
            for whole, p in zip(filled, parts, strict=True):
                whole[_place(p, whole, at_end)] = p
            return torch.cat(filled, dim)
        if any(list(p.shape) != shape for p, shape in zip(parts, shapes, strict=True)):
            raise NotJoinedError
        return torch.cat(list(parts), dim)


def _place(part: torch.Tensor, whole: torch.Tensor, at_end: bool) -> tuple[slice, ...]:
    """Where a tensor stands in one that is filled up at its end, or at its beginning."""
    pairs = zip(part.shape, whole.shape, strict=True)
    return tuple(slice(n) if at_end else slice(size - n, size) for n, size in pairs)


def padding_of(probe: Probe, dims: Dims, rows: Sequence[int]) -> dict[pytree.Path, tuple[float, bool]]:
    """What the collate function fills shorter samples up with, told from the places that only the batch has.

    Args:
        dims: the dimension that carries the samples, by the path of a tensor.
        rows: rows of every sample.

    Returns:
        The number, and whether it stands at the end, by the path of every tensor that is filled up with one number.
    """
    whole, found = dict(pytree.leaves(probe.batch)), {}
    for path, dim in dims.items():
        parts = [dict(pytree.leaves(single))[path] for single in probe.singles]
        pairs = list(zip(whole[path].split(list(rows), dim), parts, strict=True))
        if any(a < b for row, part in pairs for a, b in zip(row.shape, part.shape, strict=True)):
            continue
        for at_end in (True, False):
            outside = []
            for row, part in pairs:
                beyond = torch.ones_like(row, dtype=torch.bool)
                beyond[_place(part, row, at_end)] = False
                outside += row[beyond].unique().tolist()
            if len(set(outside)) == 1:
                found[path] = outside[0], at_end
                break
    return found


def join(parts: Sequence[Any], joint: Joint, rows: Sequence[int], path: pytree.Path = ()) -> Any:
    """A batch of batches of single samples.

    Args:
        parts: the latter.
        joint: how they are put together.
        rows: the number of rows of each.
        path: where in the batch this is.

    Returns:
        The batch.

    Raises:
        NotJoinedError: it is more than they one after another (padding).
    """
    first, like = parts[0], part_of(joint.like, path)
    if isinstance(first, torch.Tensor):
        if not all(isinstance(p, torch.Tensor) for p in parts):
            raise NotJoinedError
        return joint.tensor(parts, path)
    listed = type(first) in {list, tuple} and type(like) is type(first)
    if listed and len(like) == joint.total and [len(p) for p in parts] == list(rows):
        return type(first)(entry for part in parts for entry in part)
    below, inside = pytree.children(first), dict(pytree.children(like) or ())
    if below is None:
        if any(type(p) is not type(first) or not pytree.alike(p, first) for p in parts):
            raise NotJoinedError
        return first
    keys = [key for key, _ in below]
    if any([key for key, _ in pytree.children(p) or ()] != keys for p in parts) or inside.keys() != set(keys):
        raise NotJoinedError
    others = [dict(pytree.children(p) or ()) for p in parts]
    return pytree.rebuilt(first, {k: join([o[k] for o in others], joint, rows, (*path, k)) for k in keys})


def part_of(tree: Any, path: pytree.Path) -> Any:
    """What is at a path of a batch."""
    for key in path:
        tree = dict(pytree.children(tree) or ()).get(key)
    return tree


def joined(usual: Probe) -> Probe | None:
    """The same samples, whose batches are joined from batches of one.

    Returns:
        The probe, whose batches stand under :data:`ROOT`; ``None`` if the collate function does more (padding).
    """
    joint = Joint(usual.batch, dims_in_batch(usual), len(usual))

    def collate(items: list[Any]) -> Any:
        return {ROOT: join([item[ROOT] for item in items], joint, [1] * len(items))}

    items = tuple({ROOT: single} for single in usual.singles)
    try:
        batch = collate(list(items))
    except NotJoinedError:
        return None
    if not pytree.alike(batch[ROOT], usual.batch):
        return None
    return Probe(batch, items, collate, items)

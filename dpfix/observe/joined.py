"""The probe without the loader's collate function, which is the script's code and not to be called inside a training step.

Where a batch is nothing but its samples one after another, batches are put together from those of single samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dpfix.instrument import pytree
from dpfix.observe.call_rows import Dims, dims_in_batch
from dpfix.observe.probe import Probe

ROOT = "batch"
"""Key of the batch in a sample of such a probe."""


class NotJoinedError(Exception):
    """A batch is more than its samples one after another; caught where batches are joined."""


def join(parts: Sequence[Any], like: Any, dims: Dims, total: int, rows: Sequence[int], path: pytree.Path = ()) -> Any:
    """A batch of batches of single samples.

    Args:
        parts: the latter.
        like: what a batch of some samples holds.
        dims: the dimension that carries the samples, by the path of a tensor.
        total: the number of rows of that batch: one for every sample, or for every item of a person.
        rows: those of the parts.
        path: where in the batch this is.

    Returns:
        The batch.

    Raises:
        NotJoinedError: it is more than they one after another (padding).
    """
    first = parts[0]
    if isinstance(first, torch.Tensor):
        alike = all(
            isinstance(p, torch.Tensor) and _beside(p, dims.get(path)) == _beside(first, dims.get(path)) for p in parts
        )
        if not alike or (path not in dims and not all(torch.equal(p, first) for p in parts)):
            raise NotJoinedError
        return torch.cat(list(parts), dims[path]) if path in dims else first
    listed = type(first) in {list, tuple} and type(like) is type(first)
    if listed and len(like) == total and [len(p) for p in parts] == list(rows):
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
    return pytree.rebuilt(
        first, {k: join([o[k] for o in others], inside[k], dims, total, rows, (*path, k)) for k in keys}
    )


def _beside(tensor: torch.Tensor, dim: int | None) -> list[int]:
    """The sizes of a tensor in all dimensions but one."""
    return [size for d, size in enumerate(tensor.shape) if d != dim]


def joined(usual: Probe) -> Probe | None:
    """The same samples, whose batches are joined from batches of one.

    Returns:
        The probe, whose batches stand under :data:`ROOT`; ``None`` if the collate function does more (padding).
    """
    dims = dims_in_batch(usual)

    def collate(items: list[Any]) -> Any:
        return {ROOT: join([item[ROOT] for item in items], usual.batch, dims, len(usual), [1] * len(items))}

    items = tuple({ROOT: single} for single in usual.singles)
    try:
        batch = collate(list(items))
    except NotJoinedError:
        return None
    if not pytree.alike(batch[ROOT], usual.batch):
        return None
    return Probe(batch, items, collate, items)

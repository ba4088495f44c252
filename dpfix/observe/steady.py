"""A probe of a collate function that draws, or puts the samples into an order of its own.

Everything that is tried compares a batch with its samples one by one. A collate function that adds noise makes other ones
when it is called for a sample alone, and one that sorts gives them in another order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from dpfix.errors import USER_CODE_ERRORS
from dpfix.instrument import pytree
from dpfix.instrument.fixed_randomness import DRAWS, Draw
from dpfix.instrument.own_generators import drawing, generators_of
from dpfix.instrument.rng import rng_untouched
from dpfix.layout.row_count import UnitItems
from dpfix.layout.rows import says_an_order
from dpfix.observe.call_rows import Dims, dims_in_batch
from dpfix.observe.joined import Joint, NotJoinedError, join, padding_of
from dpfix.observe.probe import Probe


def steady(probe: Probe) -> Probe:
    """The same samples, in the collate function's order; where it draws, every sample draws the same alone and in a batch.

    Args:
        probe: made with the loader's collate function.

    Returns:
        The probe itself where its batch is that of its samples, or where nothing helps.
    """
    dims = _dims(probe)
    if not dims or _order(probe, dims) == list(range(len(probe))):
        return probe
    order = _order(probe, dims)
    if order is not None:
        items, singles = (tuple(given[i] for i in order) for given in (probe.items, probe.singles))
        again = probe.collate(list(items))
        in_order = replace(probe, batch=again, items=items, singles=singles)
        if _order(in_order, dims) == list(range(len(probe))):
            return in_order
    return _joined(probe, dims) or probe


def _rows(items: Sequence[Any]) -> list[int]:
    return [item.rows if isinstance(item, UnitItems) else 1 for item in items]


def _dims(probe: Probe) -> Dims:
    """The dimension that carries the samples: a row of each, or one of every item of a person."""
    if not isinstance(probe.items[0], UnitItems):
        return dims_in_batch(probe)
    rows, found = _rows(probe.items), {}
    for path, whole in pytree.leaves(probe.batch):
        parts = [dict(pytree.leaves(single)).get(path) for single in probe.singles]
        if isinstance(whole, torch.Tensor) and all(
            isinstance(p, torch.Tensor) and p.dim() == whole.dim() for p in parts
        ):
            sizes = zip(whole.shape, *(p.shape for p in parts), strict=True)  # type: ignore[union-attr]
            dims = [d for d, size in enumerate(sizes) if list(size) == [sum(rows), *rows]]
            found |= {path: dims[0]} if len(dims) == 1 else {}
    return found


def _joined(probe: Probe, dims: Dims) -> Probe | None:
    """Batches that are put together from samples alone, each of which draws the same; ``None`` if the collate draws nothing."""
    own = generators_of(probe.collate)

    def seeded(items: list[Any], draw: Draw) -> Any:
        with rng_untouched(), drawing(own, draw):
            torch.manual_seed(draw.torch)
            draw.seed_outside()
            return probe.collate(items)

    again = [seeded(list(probe.items), draw) for draw in DRAWS[1:3]]
    if pytree.alike(again[0], probe.batch) and pytree.alike(again[1], probe.batch):
        return None

    rows = _rows(probe.items)
    joint = Joint(probe.batch, dims, sum(rows), padding_of(probe, dims, rows))

    def collate(items: list[Any]) -> Any:
        parts = [seeded([item], DRAWS[-1]) for item in items]
        return parts[0] if len(parts) == 1 else join(parts, joint, _rows(items))

    try:
        batch = collate(list(probe.items))
        singles = tuple(collate([item]) for item in probe.items)
    except (NotJoinedError, *USER_CODE_ERRORS):
        return None
    shapes = [[getattr(leaf, "shape", None) for _, leaf in pytree.leaves(b)] for b in (batch, probe.batch)]
    return Probe(batch, singles, collate, probe.items, held=probe.held) if shapes[0] == shapes[1] else None


def _order(probe: Probe, dims: Dims) -> list[int] | None:
    """Whose rows a batch has, place by place; ``None`` if they are nobody's, or of several."""
    whole = dict(pytree.leaves(probe.batch))
    dims = {path: dim for path, dim in dims.items() if not says_an_order(whole[path])}
    rows = [whole[path].split(_rows(probe.items), dim) for path, dim in dims.items()]
    ones = [[dict(pytree.leaves(single))[path] for path in dims] for single in probe.singles]
    found = []
    for place in range(len(probe)):
        mine = [column[place] for column in rows]
        fitting = [i for i, one in enumerate(ones) if i not in found and _same(mine, one)]
        if not fitting:
            return None
        found.append(place if place in fitting else fitting[0])
    return found


def _same(mine: Sequence[torch.Tensor], one: Sequence[torch.Tensor]) -> bool:
    return all(_begins_with(a, b) for a, b in zip(mine, one, strict=True))


def _begins_with(padded: torch.Tensor, one: torch.Tensor) -> bool:
    if padded.dim() != one.dim() or any(a < b for a, b in zip(padded.shape, one.shape, strict=True)):
        return False
    begins, ends = (
        tuple(at(a, b) for a, b in zip(padded.shape, one.shape, strict=True))
        for at in (lambda a, b: slice(b), lambda a, b: slice(a - b, a))
    )
    return any(torch.allclose(padded[part], one, rtol=1e-5, atol=1e-8, equal_nan=True) for part in (begins, ends))

"""Samples as they are in a batch, where the collate function makes of one alone another form: padding to the longest."""

from __future__ import annotations

from typing import Any

import torch

from dpfix.instrument import pytree
from dpfix.layout.row_count import UnitItems
from dpfix.observe.probe import Probe


def as_in_batch(probe: Probe) -> tuple[Any, ...]:
    """Every sample cut out of the collated batch, where some sample alone has other sizes there than in the batch.

    Where samples are in the tensors inside a model is told from their sizes, for which a sample must be as long alone as with
    the others.

    Returns:
        One batch of one per sample; empty if the samples have the same sizes, or cannot be cut out.
    """
    whole = pytree.leaves(probe.batch)
    singles = [dict(pytree.leaves(single)) for single in probe.singles]
    places: dict[pytree.Path, tuple[int, list[int]]] = {}
    padded = False
    for path, leaf in whole:
        if not isinstance(leaf, torch.Tensor):
            continue
        parts = [single.get(path) for single in singles]
        shapes = [part.shape for part in parts if isinstance(part, torch.Tensor) and part.dim() == leaf.dim()]
        if len(shapes) < len(singles) or leaf.layout is not torch.strided:
            return ()
        if all(shape == leaf.shape for shape in shapes):
            continue
        several = any(isinstance(item, UnitItems) for item in probe.items)  # which may be different numbers of rows
        dims = [
            d
            for d, n in enumerate(leaf.shape)
            if n == sum(s[d] for s in shapes) and (several or len({s[d] for s in shapes}) == 1)
        ]
        if len(dims) != 1 or leaf.shape[dims[0]] == 0:
            return ()
        places[path] = dims[0], [s[dims[0]] for s in shapes]
        padded |= any(s[d] != n for s in shapes for d, n in enumerate(leaf.shape) if d != dims[0])
    if not padded:
        return ()

    def cut(sample: int) -> Any:
        def row(path: pytree.Path, leaf: Any) -> Any:
            if path not in places:
                return leaf
            dim, rows = places[path]
            return leaf.narrow(dim, sum(rows[:sample]), rows[sample]).clone()

        return pytree.map_leaves(row, probe.batch)

    return tuple(cut(sample) for sample in range(len(probe)))

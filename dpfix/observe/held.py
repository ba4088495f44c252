"""What samples hold at every place: how small and large their whole numbers are, and what stands for a missing value.

Harder probes are made of such values, so that they are ones that the script's own data have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from dpfix.instrument import pytree

Number = int | float

LOOKED_AT = 12
"""How many samples beside those of the probe are looked at."""
_MOST_NUMBERS = 2**18  # and no more once they hold so many numbers: reading samples takes time
_REPEATED = 3  # an extreme value that is met so often stands for something


@dataclass(frozen=True)
class Held:
    """Values by the path of a leaf.

    Attributes:
        low: smallest value where all are whole numbers (labels, masks, ids).
        high: the largest one.
        missing: at other places: what samples end in (padding), NaN, and a whole number that is the smallest or largest
            value and repeated (-999, -1, 0).
    """

    low: dict[pytree.Path, Number] = field(default_factory=dict)
    high: dict[pytree.Path, Number] = field(default_factory=dict)
    missing: dict[pytree.Path, tuple[Number, ...]] = field(default_factory=dict)

    def is_whole(self, path: pytree.Path) -> bool:
        """Whether only whole numbers stand there."""
        return path in self.low


def held_by(items: Iterable[Any]) -> Held:
    """What some samples hold.

    Returns:
        The values.
    """
    values: dict[pytree.Path, list[torch.Tensor]] = {}
    for item in items:
        for path, leaf in pytree.leaves(item):
            found = numbers_of(leaf)
            if found is not None and found.numel() and not found.is_complex():
                values.setdefault(path, []).append(found)
    held = Held()
    for path, parts in values.items():
        if all(bool((part == part.round()).all()) for part in parts):
            held.low[path] = min(part.min().item() for part in parts)
            held.high[path] = max(part.max().item() for part in parts)
        else:
            held.missing[path] = _missing(parts)
    return held


def _missing(parts: Sequence[torch.Tensor]) -> tuple[Number, ...]:
    found: list[Number] = list({end: None for part in parts for end in _ends_in(part)})[:1]
    there = [part[torch.isfinite(part)] for part in parts]
    there = [part for part in there if part.numel()]
    if any(bool(torch.isnan(part).any()) for part in parts):
        found.append(math.nan)
    if there:
        for extreme in (min(float(p.min()) for p in there), max(float(p.max()) for p in there)):
            if extreme == round(extreme) and sum(int((p == extreme).sum()) for p in there) >= _REPEATED:
                found.append(extreme)
    return tuple(found)


def _ends_in(part: torch.Tensor) -> list[Number]:
    """The value that fills the end of a sample, along its first dimension: the last row, or the last two numbers."""
    if part.dim() == 0 or len(part) < 2:
        return []
    end = part[-1] if part.dim() > 1 else part[-2:]
    return [float(end.reshape(-1)[0])] if end.numel() > 1 and bool((end == end.reshape(-1)[0]).all()) else []


def numbers_of(leaf: Any) -> torch.Tensor | None:
    """The numbers of a leaf as a tensor; booleans as 0 and 1; ``None`` if it holds none."""
    if isinstance(leaf, (np.ndarray, np.generic)):
        kind = leaf.dtype.kind
        return torch.as_tensor(leaf.astype(np.float64 if kind == "f" else np.int64)) if kind in "biuf" else None
    if isinstance(leaf, int) and abs(leaf) >= 2**63:
        return None
    if not isinstance(leaf, (int, float, torch.Tensor)):
        return None
    if isinstance(leaf, torch.Tensor) and leaf.layout is not torch.strided:
        return None
    values = torch.as_tensor(leaf).detach().as_subclass(torch.Tensor)
    return values.to(torch.uint8) if values.dtype is torch.bool else values  # round() knows no booleans


def look(items: Sequence[Any], more: Iterable[Callable[[], Any]]) -> tuple[Held, list[Any]]:
    """What the samples of a probe hold, and some others of the dataset.

    Args:
        items: the samples.
        more: reads others, one each.

    Returns:
        The values, and the samples of the probe: the last one is another where all have the same shapes and that one has
        others.
    """
    seen = list(items)
    numbers = sum(map(_size, seen))
    for read in more:
        if numbers > _MOST_NUMBERS:
            break
        seen.append(read())
        numbers += _size(seen[-1])
    chosen, shapes = list(items), [_shapes(item) for item in seen]
    other = next((item for item, own in zip(seen, shapes, strict=True) if own != shapes[0]), None)
    if other is not None and shapes[: len(chosen)] == shapes[:1] * len(chosen):
        chosen[-1] = other
    return held_by(seen), chosen


def _shapes(item: Any) -> list[Any]:
    return [(path, tuple(getattr(leaf, "shape", ()))) for path, leaf in pytree.leaves(item)]


def _size(item: Any) -> int:
    return sum(leaf.numel() if isinstance(leaf, torch.Tensor) else np.size(leaf) for _, leaf in pytree.leaves(item))

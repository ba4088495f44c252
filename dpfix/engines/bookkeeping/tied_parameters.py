"""Several contributions to one parameter: a norm needs their sum per sample, not the sum of their norms."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence

from dpfix.engines.bookkeeping.contributions import Apart, Contribution, Kept, Part
from dpfix.engines.bookkeeping.embedding import Lookup, Tied
from dpfix.engines.bookkeeping.linear import Outer


def add_up(parts: Sequence[Contribution]) -> Contribution:
    """One contribution that is the sum of several, without per-sample gradients where there is a way.

    Args:
        parts: contributions to one parameter with the same samples.

    Returns:
        Their sum.
    """
    kinds: dict[Hashable, list[Contribution]] = {}
    for part in parts:
        kinds.setdefault(part.kind, []).append(part)
    parts = [first.joined(others) if others else first for first, *others in kinds.values()]
    if len(parts) == 1:
        return parts[0]
    if all(isinstance(p, Part) for p in parts):
        places = _by_place([p for p in parts if isinstance(p, Part)])
        if all(a.last <= b.first for a, b in itertools.pairwise(places)):
            return Apart(places)
    match sorted(parts, key=lambda p: isinstance(p, Outer)):
        case [Lookup() as lookup, Outer() as product]:
            return Tied(lookup, product)
    return Kept(parts[0].per_sample()).joined([Kept(p.per_sample()) for p in parts[1:]])


def _by_place(parts: Sequence[Part]) -> list[Part]:
    places: dict[tuple[int, int], list[Contribution]] = {}
    for part in parts:
        places.setdefault((part.first, part.last), []).append(part.inner)
    shape = parts[0].shape
    return [Part(add_up(inner), *place, shape) for place, inner in sorted(places.items(), key=lambda item: item[0])]

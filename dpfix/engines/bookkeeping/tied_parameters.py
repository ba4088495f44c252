"""Several contributions to one parameter: a norm needs their sum per sample, not the sum of their norms."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

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
    if len(parts) == 1:
        return parts[0]
    products = [p for p in parts if isinstance(p, Outer)]
    lookups = [p for p in parts if isinstance(p, Lookup)]
    pieces = [p for p in parts if isinstance(p, Part)]
    if len(products) + len(lookups) == len(parts):
        product = products[0].joined(products[1:]) if products else None
        lookup = lookups[0].joined(lookups[1:]) if lookups else None
        if product is not None and lookup is not None:
            return Tied(lookup, product)
        return product or lookup or parts[0]
    if len(pieces) == len(parts):
        places = _by_place(pieces)
        if all(a.last <= b.first for a, b in itertools.pairwise(places)):
            return Apart(places)
    total = parts[0].per_sample().clone()
    for part in parts[1:]:
        total += part.per_sample()
    return Kept(total)


def _by_place(parts: Sequence[Part]) -> list[Part]:
    places: dict[tuple[int, int], list[Contribution]] = {}
    for part in parts:
        places.setdefault((part.first, part.last), []).append(part.inner)
    shape = parts[0].shape
    return [Part(add_up(inner), *place, shape) for place, inner in sorted(places.items(), key=lambda item: item[0])]

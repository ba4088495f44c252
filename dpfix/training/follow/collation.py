"""Whether what a collate function makes of a sample depends on the samples beside it: it is called once more on a few of them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dpfix.errors import USER_CODE_ERRORS
from dpfix.instrument import pytree
from dpfix.instrument.fixed_randomness import DRAWS, Draw, FixedRandomness, outside_states
from dpfix.instrument.own_generators import drawing, generators_of, states_of
from dpfix.instrument.rng import generator_states, rng_untouched
from dpfix.layout.row_count import UnitItems
from dpfix.layout.rows import Rows, says_an_order
from dpfix.training.follow import messages
from dpfix.training.follow.agenda import SHARE, Agenda
from dpfix.training.follow.delivery import BatchLayout, leaves_of, part_at
from dpfix.training.follow.row_order import moved

Collate = Callable[[list[Any]], Any]

SIZE = 4
"""Samples in the batches that are compared."""
MOST_PERSONS = 32
"""Persons among whom it is looked whether rows keep their places."""
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
_ROUGH = 2e-2


class Collation:
    """Makes the batches of a loader; in some of them, what the collate function makes of a sample is looked at.

    Batches of one sample and copies of a second are compared with batches of it and copies of a third. Some row of the one must
    be a row of the other, up to padding; where it is does not matter, a collate function may sort. Both calls draw alike. Looking
    is done where batches are made, on copies of the items that were read anyway, in a worker too; nothing is read twice, and
    generators go on as if nothing had been. What depends on all samples and is no row (a count, class weights) is right as
    long as nothing is computed with it; it is remembered, and looked at in the step.

    Args:
        layout: how the batches carry their samples.
        share: share of the time between batches that looking may take.
    """

    def __init__(self, layout: BatchLayout, share: float = SHARE) -> None:
        self._layout, self._agenda = layout, Agenda(share)
        self._looked = 0

    def __call__(self, collate: Collate, items: list[Any]) -> Any:
        """The batch of some items.

        Args:
            collate: the collate function.
            items: what the dataset gave.

        Returns:
            What the collate function returns.

        Raises:
            CoupledModelError: one sample's part depends on the others.
        """
        if len(items) < 2 or not self._layout.known or not self._agenda.due(set()):
            return collate(items)
        with self._agenda.check():
            draw = DRAWS[1 + self._looked % (len(DRAWS) - 1)]
            self._looked += 1
            self.look_at_order(collate, items, draw)
            self.look(collate, _copied(self._agenda.draw.sample(items, min(3, len(items)))), [draw])
        return collate(items)

    def look(self, collate: Collate, items: Sequence[Any] | None, draws: Sequence[Draw] = DRAWS[1:]) -> None:
        """Compare batches of two or three items; whatever the collate function cannot take is left out.

        Args:
            collate: the collate function, called twice for each draw.
            items: they may be changed.
            draws: what random numbers are like.

        Raises:
            CoupledModelError: one sample's part depends on the others.
        """
        if items is None or not self._layout.known:
            return
        generators = generators_of(collate)
        if self._layout.by_row:
            items = [item.one_row() for item in items]
        for number, draw in enumerate(draws):
            keep, other, third = (items[(number + k) % len(items)] for k in range(3))
            place = self._agenda.draw.randrange(SIZE)
            batches = [_around(place, keep, others) for others in (other, third)]
            try:
                made = [_make(collate, batch, generators, draw) for batch in batches]
                found = self._compare(made[0], made[1])
                if found is None or not _repeats(collate, batches[0], generators, draw, made[0]):
                    continue
                pairs = zip(batches, made, strict=True)
                if made[0].drawn and any(self._sorts(collate, batch, generators, draw, m) for batch, m in pairs):
                    continue  # a sample that has moved draws other numbers
            except USER_CODE_ERRORS:
                continue
            self._conclude(found, collate)

    def look_at_order(self, collate: Collate, items: Sequence[Any], draw: Draw = DRAWS[1]) -> None:
        """Items of a person have to stay together: the engine takes the rows at their places for hers.

        Every row draws the same numbers here, so that a row is known again that is changed by chance.

        Args:
            collate: the collate function, called for some persons together and for each of them alone.
            items: the persons.
            draw: what random numbers are like.

        Raises:
            moved_by_collation: rows are moved to places of another person.
        """
        persons = [item for item in items if isinstance(item, UnitItems)]
        some = _copied(self._agenda.draw.sample(persons, min(MOST_PERSONS, len(persons))))
        if not some or not self._layout.known:
            return
        generators = generators_of(collate)
        try:
            ones = [_make(collate, [item], generators, draw, alike=True) for item in some]
            moves = any(
                self._moves(collate, persons, alone, generators, draw)
                for persons, alone in ((some, ones), (some[::-1], ones[::-1]))
            )
        except USER_CODE_ERRORS:
            return
        if moves:
            raise messages.moved_by_collation(_users(collate))

    def _moves(self, collate: Collate, persons: list[Any], ones: Sequence[_Made], generators: Any, draw: Draw) -> bool:
        """Whether some row of persons is at the place of another one, whichever numbers are drawn."""
        whole = _make(collate, persons, generators, draw, alike=True)
        found: list[tuple[bool, bool]] = []
        for path, dim in self._layout.tensors.items():
            leaf, *parts = (part_at(made.batch, path) for made in (whole, *ones))
            if all(isinstance(part, (torch.Tensor, np.ndarray)) for part in (leaf, *parts)):
                tensors = [_tensor(part) for part in parts]
                found.append(moved(_tensor(leaf), tensors, dim.dim, lambda a, b: _leaf_gap(a, b) is None))
        moves = any(elsewhere and (none_kept or not whole.drawn) for elsewhere, none_kept in found)
        return moves and (whole.drawn or _repeats(collate, persons, generators, draw, whole, alike=True))

    def _conclude(self, found: _Mixed | _Whole, collate: Collate) -> None:
        if isinstance(found, _Mixed):
            raise messages.coupled_collation(found.gap, found.path, _users(collate))
        self._layout.of_all.update(found.paths)

    def _compare(self, one: _Made, other: _Made) -> _Mixed | _Whole | None:
        """What is wrong with two batches that have one sample in common; ``None`` if nothing is, or if it cannot be told."""
        if one.state != other.state or any(self._layout.samples(made.batch) != SIZE for made in (one, other)):
            return None
        rows, others = (self._rows(made.batch) for made in (one, other))
        gaps = [[_gap(mine, now) for now in others] for mine in rows]
        if all(gap is not None for row in gaps for gap in row):
            place = min(range(SIZE), key=lambda i: gaps[i][i].gap)  # type: ignore[union-attr]
            return gaps[place][place]
        whole = [path for path, leaf in leaves_of(one.batch) if self._of_all(path, leaf, part_at(other.batch, path))]
        return _Whole(whole) if whole else None

    def _rows(self, batch: Any) -> list[dict[pytree.Path, Any]]:
        found: list[dict[pytree.Path, Any]] = [{} for _ in range(SIZE)]
        for path, dim in self._layout.tensors.items():
            leaf = _tensor(part_at(batch, path))
            if not says_an_order(leaf):
                for row, part in zip(found, Rows.of(dim, SIZE).split(leaf), strict=True):
                    row[path] = part
        for path in self._layout.lists:
            for row, entry in zip(found, part_at(batch, path), strict=True):
                row |= {(*path, *below): leaf for below, leaf in pytree.leaves(entry)}
        return found

    def _of_all(self, path: pytree.Path, leaf: Any, other: Any) -> bool:
        """Whether a leaf that is no row and holds a number or floating values is another one in the other batch."""
        if any(path[: len(known)] == known for known in (*self._layout.tensors, *self._layout.lists)):
            return False
        if type(leaf) in (int, float) and type(other) in (int, float):
            return leaf != other
        if not isinstance(leaf, (torch.Tensor, np.ndarray, np.number)) or type(leaf) is not type(other):
            return False
        mine, now = _tensor(leaf), _tensor(other)
        numbers = mine.dim() == 0 or mine.is_floating_point()
        return numbers and mine.shape == now.shape and not _close(mine, now)

    def _sorts(self, collate: Collate, items: list[Any], generators: Any, draw: Draw, made: _Made) -> bool:
        """Whether the items' order does not matter to the collate function, as far as they differ to it."""
        turned = _make(collate, items[::-1], generators, draw)
        pairs = zip(self._rows(made.batch), self._rows(turned.batch), strict=True)
        return all(_gap(mine, now) is None for mine, now in pairs)


@dataclass(frozen=True)
class _Made:
    """A batch; ``state`` is where the generators are afterwards, and ``drawn`` whether they have moved."""

    batch: Any
    state: Any
    drawn: bool


@dataclass(frozen=True)
class _Mixed:
    gap: float
    path: pytree.Path


@dataclass(frozen=True)
class _Whole:
    paths: list[pytree.Path]


def _users(collate: Collate) -> Any:
    """The script's own function inside of those that call it."""
    collate = getattr(collate, "__self__", collate)
    while hasattr(collate, "collate"):
        collate = collate.collate
    return collate


def _copied(items: Sequence[Any]) -> list[Any] | None:
    try:
        return copy.deepcopy(list(items))
    except (*USER_CODE_ERRORS, NotImplementedError, copy.Error):
        return None


def _around(place: int, keep: Any, other: Any) -> list[Any]:
    return [keep if k == place else other for k in range(SIZE)]


def _make(collate: Collate, items: list[Any], generators: Any, draw: Draw, *, alike: bool = False) -> _Made:
    """A batch of copies of the items: a collate function may take them apart.

    Args:
        alike: whether every row draws the same numbers, as far as the draws can be told from others.

    Returns:
        The batch, and what the generators have done.
    """
    items = [copy.deepcopy(item) for item in items]
    with rng_untouched(), drawing(generators, draw):
        torch.manual_seed(draw.torch)
        draw.seed_outside()
        before = _state(generators)
        with FixedRandomness(draw=draw) if alike else nullcontext():
            batch = collate(items)
        after = _state(generators)
    return _Made(batch, after, after != before)


def _state(generators: Any) -> Any:
    return outside_states(), *(bytes(s.numpy()) for s in generator_states()[:1]), states_of(generators)


def _repeats(
    collate: Collate, items: list[Any], generators: Any, draw: Draw, made: _Made, *, alike: bool = False
) -> bool:
    """Whether the collate function gives the same for the same items; it may count its calls."""
    again = dict(leaves_of(_make(collate, items, generators, draw, alike=alike).batch))
    return all(_leaf_gap(leaf, again.get(path)) is None for path, leaf in leaves_of(made.batch))


def _gap(mine: dict[pytree.Path, Any], other: dict[pytree.Path, Any]) -> _Mixed | None:
    """The entry in which two samples' parts differ most; ``None`` if they are equal up to padding, or if it cannot be told."""
    found = [_Mixed(gap, path) for path, leaf in mine.items() if (gap := _leaf_gap(leaf, other.get(path))) is not None]
    cut = any(getattr(leaf, "shape", ()) != getattr(other.get(path), "shape", ()) for path, leaf in mine.items())
    return None if cut and len(found) < len(mine) else max(found, key=lambda m: m.gap, default=None)


def _leaf_gap(a: Any, b: Any) -> float | None:
    arrays = (torch.Tensor, np.ndarray)
    if isinstance(a, arrays) and isinstance(b, arrays):
        a, b = _tensor(a), _tensor(b)
        return None if any(_close(x, y) for x, y in _in_common(a, b)) else _size_of(a, b)
    if type(a) in (int, float) and type(b) in (int, float):
        return None if math.isclose(a, b, rel_tol=1e-6) or (a != a and b != b) else math.inf
    return None if pytree.alike(a, b) else math.inf


def _in_common(a: torch.Tensor, b: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Two tensors as far as both have places, padded at the end or at the beginning."""
    if a.shape == b.shape or a.dim() != b.dim():
        yield a, b
        return
    sizes = [min(x, y) for x, y in zip(a.shape, b.shape, strict=True)]
    yield a[tuple(slice(n) for n in sizes)], b[tuple(slice(n) for n in sizes)]
    yield tuple(t[tuple(slice(m - n, m) for m, n in zip(t.shape, sizes, strict=True))] for t in (a, b))  # type: ignore[misc]


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if torch.equal(a, b):
        return True
    if not a.is_floating_point():
        return False
    tolerance = _TOLERANCE.get(a.dtype, _ROUGH)
    size = float(torch.nan_to_num(a.double()).abs().amax()) if a.numel() else 0.0
    return torch.allclose(a.double(), b.double(), rtol=0, atol=tolerance * size, equal_nan=True)


def _size_of(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.shape != b.shape or not a.numel() or a.is_complex():
        return math.inf
    a, b = torch.nan_to_num(a.double()), torch.nan_to_num(b.double())
    return float((a - b).abs().amax() / a.abs().amax().clamp(min=1e-12))


def _tensor(leaf: Any) -> torch.Tensor:
    return leaf.detach() if isinstance(leaf, torch.Tensor) else torch.as_tensor(np.ascontiguousarray(leaf))

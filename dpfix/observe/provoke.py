"""Harder probes: samples that bring out what depends on the data, made of values that the script's own samples hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from dpfix.instrument import pytree
from dpfix.observe.held import Number, numbers_of
from dpfix.observe.probe import Probe

SCALED = 1
"""Number of the sample that :func:`provoked` scales (the last one of a smaller probe)."""

_PROVOKED = 3
"""Size of a harder probe: beside an empty and a rare sample, an ordinary one."""

Change = Callable[[int, pytree.Path, Any], Any]
"""``(sample number, path, leaf) -> leaf``; the very same leaf if it stays."""


def provoked(probe: Probe) -> tuple[Callable[[], Probe], ...]:
    """Probes that bring out what depends on the data: an empty mask, a rare label, an outlier.

    The first has them all; the others one each, for steps that cannot take some of them.

    Returns:
        Functions that make the changed probes, since a collate function may reject one: sample 0 with the smallest
        labels and empty masks, sample 1 with the largest labels and floating values 50 times as large. Labels
        come from the values that the samples hold at the same path; where they hold a single one, the next is tried too.
        Sample 2 stays as it is; further ones would show nothing new and are left out.
    """
    low, high = probe.held.low, probe.held.high
    scaled = min(SCALED, len(probe) - 1)

    def blank(i: int, path: pytree.Path, leaf: Any) -> Any:
        return filled(leaf, low[path]) if i == 0 and path in low else leaf

    def rare(i: int, path: pytree.Path, leaf: Any) -> Any:
        if i != 1 or path not in high:
            return leaf
        return filled(leaf, high[path] + (high[path] == low[path]))

    def rarer(i: int, path: pytree.Path, leaf: Any) -> Any:
        return filled(leaf, low[path] - 1) if i == 1 and path in low and low[path] == high[path] else leaf

    def outlier(i: int, path: pytree.Path, leaf: Any) -> Any:
        return leaf * 50 if i == scaled and path not in low and _is_floating(leaf) else leaf

    def everything(i: int, path: pytree.Path, leaf: Any) -> Any:
        return outlier(i, path, rare(i, path, blank(i, path, leaf)))

    changes = (everything, blank, rare, rarer, outlier)
    return tuple(partial(probe.changed, change, _PROVOKED) for change in changes)


def emptied(probe: Probe) -> Probe:
    """A sample of nothing but zeros (padding, background) and empty strings beside an ordinary one.

    Returns:
        Two samples; whole numbers of the first are the smallest that the samples hold at the same path.
    """
    low = probe.held.low

    def empty(i: int, path: pytree.Path, leaf: Any) -> Any:
        if i:
            return leaf
        if isinstance(leaf, (str, bytes)):
            return type(leaf)()
        return filled(leaf, low[path]) if path in low else leaf * 0 if _is_floating(leaf) else leaf

    return probe.changed(empty, 2)


def shortened(probe: Probe, paths: Iterable[pytree.Path]) -> Probe | None:
    """Sample 1 with less in it than the others: the end of what it holds is padding, or masked.

    Args:
        paths: where the model's inputs stand.

    Returns:
        Two samples; ``None`` where no leaf of several numbers has a value for what is missing.
    """
    values = {path: fillings(probe, path)[:1] for path in paths}

    def shorter(i: int, path: pytree.Path, leaf: Any) -> Any:
        if i != 1 or not values.get(path) or _stays(probe.items[i], path, 0.5):
            return leaf
        return partly(leaf, values[path][0], 0.5)

    changed = probe.changed(shorter, 2)
    return changed if None in changed.unchanged else None


def _stays(item: Any, path: pytree.Path, share: float) -> bool:
    """Whether a number stands at the beginning of a list of numbers, which a tokenizer delivers."""
    numbers, place = (pytree.at(item, path[:-1]), path[-1]) if path else (None, None)
    return isinstance(numbers, list) and isinstance(place, int) and place < max(1, round(share * len(numbers)))


def fillings(probe: Probe, path: pytree.Path, special: Sequence[Number] = ()) -> tuple[Number, ...]:
    """Values that a leaf may be filled with, most telling first.

    Args:
        special: numbers that mean something to the loss: an ``ignore_index``, the class with the largest weight.

    Returns:
        The values, each once: special ones, what stands for a missing value, the smallest and the largest one.
    """
    held = probe.held
    if held.is_whole(path):
        low, high = held.low[path], held.high[path]
        ends = [low, high] if low != high else [1 - low] if low in (0, 1) else []
        return _each_once([v for v in special if v == v and v == round(v)] + ends)
    return _each_once([*special, *held.missing.get(path, ())])


def _each_once(values: Iterable[Number]) -> tuple[Number, ...]:
    return tuple({str(float(v)): v for v in values}.values())  # NaN is no value twice


def fills(probe: Probe, paths: Sequence[pytree.Path], special: Sequence[Number]) -> Iterator[Change]:
    """Changes of labels and other leaves that no model sees: some values in each, partly and as a whole.

    Args:
        paths: where they stand.
        special: numbers that mean something to the loss.

    Yields:
        Changes of all samples but the last: every one gets another value. First those that leave the beginning of a
        leaf as it is, then those that fill it, then labels that are alike for two, for all, for none of the samples.
    """
    values = {path: fillings(probe, path, special) for path in paths}
    several = any(numbers.numel() > 1 for numbers in _numbers(probe, paths))
    changing = len(probe) - 1
    for share in (0.25, 0.0) if several else (0.0,):
        for start in range(0, max(map(len, values.values()), default=0), changing):
            yield partial(_fill, values, start, changing, share)
    if any(numbers.numel() == 1 for numbers in _numbers(probe, paths)):
        yield from (partial(_like, probe, paths, group) for group in (2, len(probe)))
        if any(_classes(probe, path) >= len(probe) for path in paths):
            yield partial(_apart, probe, paths)


def _fill(
    values: dict[pytree.Path, tuple[Number, ...]],
    start: int,
    changing: int,
    share: float,
    i: int,
    path: pytree.Path,
    leaf: Any,
) -> Any:
    choices = values.get(path, ())
    return partly(leaf, choices[(start + i) % len(choices)], share) if choices and i < changing else leaf


def _like(probe: Probe, paths: Sequence[pytree.Path], group: int, i: int, path: pytree.Path, leaf: Any) -> Any:
    """Labels of every sample like those of the first of its group."""
    if path not in paths or not probe.held.is_whole(path) or i % group == 0:
        return leaf
    return dict(pytree.leaves(probe.items[i - i % group])).get(path, leaf)


def _apart(probe: Probe, paths: Sequence[pytree.Path], i: int, path: pytree.Path, leaf: Any) -> Any:
    fits = path in paths and _classes(probe, path) >= len(probe)
    return filled(leaf, probe.held.low[path] + i) if fits else leaf


def _classes(probe: Probe, path: pytree.Path) -> int:
    held = probe.held
    return int(held.high[path] - held.low[path]) + 1 if held.is_whole(path) else 0


def _numbers(probe: Probe, paths: Sequence[pytree.Path]) -> Iterator[torch.Tensor]:
    for path, leaf in pytree.leaves(probe.items[0]):
        numbers = numbers_of(leaf) if path in paths else None
        if numbers is not None:
            yield numbers


def _is_floating(leaf: Any) -> bool:
    if isinstance(leaf, np.ndarray):
        return np.issubdtype(leaf.dtype, np.floating)
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()


def filled(leaf: Any, value: Number) -> Any:
    """A leaf with one value everywhere."""
    if isinstance(leaf, torch.Tensor):
        return torch.full_like(leaf, value)
    if isinstance(leaf, np.ndarray):
        return np.full_like(leaf, value)
    return type(leaf)(value)


def partly(leaf: Any, value: Number, share: float) -> Any:
    """A leaf that ends in one value.

    Args:
        share: how much of the beginning stays, along the first dimension of more than one entry.

    Returns:
        The changed leaf; all of it is filled where it is one number.
    """
    if not isinstance(leaf, (torch.Tensor, np.ndarray)) or math.prod(leaf.shape) <= 1 or not share:
        return filled(leaf, value)
    dim = next(d for d, size in enumerate(leaf.shape) if size > 1)
    out = leaf.clone() if isinstance(leaf, torch.Tensor) else leaf.copy()
    out[(slice(None),) * dim + (slice(max(1, round(share * leaf.shape[dim])), None),)] = value
    return out

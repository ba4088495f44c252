"""Whether anybody else's data matters to a sample: its rows before, in and after the model, with the others exchanged."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch

from dpfix.instrument import pytree
from dpfix.layout.calls import CallLayout
from dpfix.layout.rows import Rows
from dpfix.training.follow.calls import Call, ModelCall
from dpfix.training.follow.delivery import Exchange
from dpfix.training.follow.step import (
    ROUGH,
    TOLERANCE,
    DecidesError,
    NotFollowedError,
    RealStep,
    Repeated,
    Way,
    tensors_of,
)

SAMPLES = 6
"""Samples that are looked at in one check."""
MODEL_SAMPLES = 4
"""Samples that are looked at in what the model makes of them."""

_SMALL = 1e-4
"""A sample whose gradient is smaller than this share of the largest is compared with that share: below is rounding."""


@dataclass(frozen=True)
class Coupling:
    """A sample feels the others.

    Attributes:
        where: ``"input"`` (what the model is called with), ``"model"`` or ``"loss"``.
        gap: by how much its part changes, relatively.
        number: the call of the model, for ``"input"`` and ``"model"``.
        path: the argument, for ``"input"``.
    """

    where: str
    gap: float
    number: int = 0
    path: Any = ()


def exchanges(step: RealStep, draw: Random) -> Iterator[Exchange]:
    """Other samples for every place but one, in ways that show different couplings.

    All others are copies of one sample, each time of another one: whichever it is that the others feel (the largest of all), it
    is gone in most of them. Half are copies of the sample itself (pairs of one label); whole numbers of the others are all
    the smallest, or all the largest, of the batch. Samples that the loss feels most and least are always looked at, and stand
    in for others: the hardest, a rare class with a large weight, one of which everything is masked.

    Args:
        step: with at least 2 samples.
        draw: chooses the samples.
    """
    samples, telling = step.samples, step.telling
    for keep, other in _pairs(step, SAMPLES, draw):
        if samples > 2:
            yield Exchange(tuple(keep if j == keep else other for j in range(samples)), keep)
        among = [j for j in (telling if draw.random() < 0.5 else range(samples)) if j != keep]
        yield Exchange(_alternating(samples, keep, draw.choice(among or [other])), keep)
        yield Exchange((), keep, torch.amin)
        yield Exchange((), keep, torch.amax)


def replacements(step: RealStep, draw: Random) -> Iterator[Exchange]:
    """As :func:`exchanges`, for what the model itself does: fewer samples, and no whole numbers that are nobody's.

    Args:
        step: with at least 2 samples.
        draw: chooses the samples.
    """
    for keep, other in _pairs(step, MODEL_SAMPLES, draw):
        alike = keep if step.samples == 2 else other
        yield Exchange(tuple(keep if j == keep else alike for j in range(step.samples)), keep)


def _pairs(step: RealStep, most: int, draw: Random) -> Iterator[tuple[int, int]]:
    """Samples to look at, each with another one that stands in for others; nobody does so twice."""
    rest = [j for j in range(step.samples) if j not in step.telling]
    looked_at = [*step.telling, *draw.sample(rest, max(0, min(most, step.samples) - len(step.telling)))]
    draw.shuffle(looked_at)
    yield from zip(looked_at, [*looked_at[1:], looked_at[0]], strict=True)


def _alternating(samples: int, keep: int, other: int) -> tuple[int, ...]:
    """Copies of the sample itself in about half of the places of the others; of two samples, in both."""
    if samples == 2:
        return keep, keep
    places = [j for j in range(samples) if j != keep]
    mine = {keep, *places[: (len(places) + 1) // 2]}  # never half: who is who is told by the numbers
    return tuple(keep if j in mine else other for j in range(samples))


def coupled(way: Way, step: RealStep, draw: Random) -> Coupling | None:
    """Look for a sample whose part in the inputs or in the loss changes with the others.

    Args:
        way: repeats the step.
        draw: chooses samples and exchanges.

    Returns:
        The coupling, or ``None``.

    Raises:
        NotFollowedError: the step cannot be repeated with any exchange.
    """
    base = way.repeat(None)
    compared, why, sorted_, decides = 0, "", False, False
    for exchange in exchanges(step, draw):
        if sorted_ and exchange.extreme is not None:
            continue  # where a sample goes to cannot be told from changed values
        try:
            other = way.repeat(exchange)
        except NotFollowedError as error:
            why = why or str(error)
            decides |= isinstance(error, DecidesError) and exchange.extreme is None
            continue
        compared += exchange.extreme is None
        sorted_ |= other.placement is not None
        found = difference(base, other, step, exchange.keep)
        if found is not None:
            return found
    if not compared or decides:
        raise NotFollowedError(why)
    return _by_what_is_of_all(way, step, base, draw)


def _by_what_is_of_all(way: Way, step: RealStep, base: Repeated, draw: Random) -> Coupling | None:
    """Whether a number or a tensor that the loader has made of the whole batch matters to anybody."""
    if not any(delivery.of_all for delivery in step.deliveries):
        return None
    for keep in draw.sample(range(step.samples), min(SAMPLES, step.samples)):
        try:
            other = way.repeat(Exchange(tuple(range(step.samples)), keep, of_all=True))
        except NotFollowedError:
            return None  # a length, without which the step cannot be made
        found = difference(base, other, step, keep)
        if found is not None:
            return found
    return None


def difference(base: Repeated, other: Repeated, step: RealStep, sample: int) -> Coupling | None:
    """What differs for one sample between the step and its repetition with other samples in its place."""
    place = other.placement
    before_row, after_row = (sample, sample) if place is None else (place.before, place.after)
    for number, (mine, changed) in enumerate(zip(base.arguments, other.arguments, strict=True)):
        layout = step.calls[number].layout
        assert layout is not None
        found = _input(mine, changed, layout, step.samples, (before_row, after_row))
        if found is not None:
            return Coupling("input", found[1], number, found[0])
    for number, (mine, changed) in enumerate(zip(base.gradients, other.gradients, strict=True)):
        for output, before, after in zip(step.calls[number].outputs, mine, changed, strict=True):
            if output.dim is None:
                continue  # a loss that the model has computed
            gap = rows_gap(before, after, Rows.of(output.dim, step.samples), before_row, after_row)
            if gap:
                return Coupling("loss", gap, number)
    return None


def _input(
    mine: Any, changed: Any, layout: CallLayout, samples: int, places: tuple[int, int]
) -> tuple[Any, float] | None:
    dims = dict(layout.inputs)
    after = dict(tensors_of(changed))
    for path, before in tensors_of(mine):
        other = after.get(path)
        if other is None or other.shape != before.shape:
            continue  # a list of samples of different shapes
        dim = dims.get(path)
        if dim is not None and not dim.counts:
            gap = rows_gap(before.detach(), other.detach(), Rows.of(dim, samples), *places)
        elif path in dims:
            gap = _gap(before.detach(), other.detach(), 0.0)
        else:
            continue
        if gap:
            return path, gap
    return None


def rows_gap(before: torch.Tensor, after: torch.Tensor, rows: Rows, sample: int, now: int | None = None) -> float:
    """The relative change of one sample's rows; 0 if it is rounding.

    Args:
        before: laid out as ``rows`` says.
        after: the same with other samples.
        rows: where the samples are.
        sample: the place of the sample before.
        now: its place after; the same if not given.

    Returns:
        The change.
    """
    mine, other = rows.take(before, sample), rows.take(after, sample if now is None else now)
    if mine.shape == other.shape and torch.equal(mine, other):
        return 0.0
    return _gap(mine, other, max(_norm(part) for part in rows.split(before)))


def _gap(before: torch.Tensor, after: torch.Tensor, largest: float) -> float:
    if before.shape == after.shape and torch.equal(before, after):
        return 0.0
    finite = [bool(torch.isfinite(t).all()) for t in (before, after)]
    if not all(finite):
        return math.inf if any(finite) else 0.0  # what is not finite anyway has checks of its own
    scale = max(_norm(before), _SMALL * largest, 1e-30)
    gap = _norm(before.double() - after.double() if not before.is_complex() else before - after) / scale
    return 0.0 if gap <= TOLERANCE.get(before.dtype, ROUGH if before.is_floating_point() else 0.0) else gap


def _norm(t: torch.Tensor) -> float:
    t = torch.view_as_real(t.to(torch.complex128)) if t.is_complex() else t.double()
    return float(torch.linalg.vector_norm(torch.nan_to_num(t)))


# ------------------------------------------------------------------ a mean or a sum


def other_reduction(way: Way, step: RealStep, mean: bool, calls: Sequence[Call | ModelCall]) -> str:
    """What a loss is, if it is not what was announced.

    Args:
        way: repeats the step, here with copies of one sample: a loop may reorder a batch.
        mean: whether a mean over the samples was announced.
        calls: what the loss is made of; empty if the script's own code is repeated.

    Returns:
        ``"sum"`` or ``"mean"``; empty if it is what was announced, or cannot be told.
    """
    many = (step.samples + 1) // 2
    few = max(1, many // 2)
    if few == many or step.outer is not None:
        return ""  # too few samples, or the script weighs them itself
    try:
        base, changed = (way.repeat(Exchange((0,) * copies, 0)) for copies in (many, few))
    except NotFollowedError:
        return ""
    ratios = []
    for number, (mine, others) in enumerate(zip(base.gradients, changed.gradients, strict=True)):
        for output, before, after in zip(step.calls[number].outputs, mine, others, strict=True):
            if output.dim is None:
                continue
            whole = _norm(Rows.of(output.dim, many).take(before, 0))
            part = _norm(Rows.of(output.dim, few).take(after, 0))
            if whole > 0:
                ratios.append(part / whole)
    if not ratios or _divides_by_hand(calls, step.samples):
        return ""
    is_mean = all(abs(r - many / few) < 0.05 * r for r in ratios)
    is_sum = all(abs(r - 1) < 0.05 for r in ratios)
    return "sum" if is_sum and mean else "mean" if is_mean and not mean else ""


def _divides_by_hand(calls: Sequence[Call | ModelCall], n: int) -> bool:
    """Whether the batch size may be written into the loss as a number (``/ len(x)``): it does not change with the rows."""
    leaves = [leaf for c in calls if isinstance(c, Call) for _, leaf in pytree.leaves((c.args, c.kwargs))]
    numbers = [abs(x) for x in leaves if type(x) in {int, float} and 1e-12 < abs(x) < 1e12]
    return any(size >= n and abs(size / n - round(size / n)) < 1e-6 for x in numbers for size in (x, 1 / x))

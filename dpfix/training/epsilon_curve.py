"""Epsilon over the steps of a training, for the page: what was spent, and what is spent if it goes on."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any

from dpfix.report.curve import EpsilonCurve
from dpfix.training.epsilon import Accuracy, Entry, answer

POINTS = 4
"""Of each part of the curve."""
MOST_POINTS = 200_000
"""Of the grid on which a point is computed; beyond it Renyi accounting bounds it. A page is to appear at once."""


def epsilon_curve(
    accountant: Any, delta: float, further: tuple[Entry, str] | None, counted: str = "steps"
) -> EpsilonCurve:
    """Epsilon of an accountant's history, part by part.

    Args:
        accountant: with everything that was released.
        delta: that the curve holds for.
        further: releases that may come, and why so many; none if it is ``None``.
        counted: what a release is called.

    Returns:
        The curve; it begins at no release, where epsilon is 0.
    """
    history: list[Entry] = list(accountant.history)
    made = sum(times for *_, times in history)

    def at(releases: int, entries: list[Entry]) -> tuple[int, float]:
        part = copy.copy(accountant)
        part.history = entries
        return releases, answer(part, delta, Accuracy(), MOST_POINTS)[0].epsilon

    so_far = [(0, 0.0), *(at(n, _first(history, n)) for n in _marks(made))]
    to_come, words = [so_far[-1]], ""
    if further is not None:
        (noise, rate, times), words = further
        to_come += [at(made + n, [*history, (noise, rate, n)]) for n in _marks(times)]
    return EpsilonCurve(delta, tuple(so_far), tuple(to_come) if to_come[1:] else (), counted, words)


def _marks(number: int) -> list[int]:
    return sorted({math.ceil(number * k / POINTS) for k in range(1, POINTS + 1)} - {0})


def _first(history: Iterable[Entry], number: int) -> list[Entry]:
    """The first so many releases."""
    found: list[Entry] = []
    for noise, rate, times in history:
        if number <= 0:
            break
        found.append((noise, rate, min(times, number)))
        number -= times
    return found

"""Epsilon over the steps of a training: those that were made, and those that may come."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EpsilonCurve:
    """Epsilon after so many releases, at one delta.

    Attributes:
        delta: the delta that it holds for.
        so_far: pairs of releases and epsilon, from none to now.
        to_come: the same from now on, if the settings stay what they are.
        counted: what a release is called: a step, or a pass where a pass is one.
        words: where the numbers to come end, and why there.
    """

    delta: float
    so_far: tuple[tuple[int, float], ...]
    to_come: tuple[tuple[int, float], ...] = ()
    counted: str = "steps"
    words: str = ""

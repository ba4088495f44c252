"""Epsilon for a progress bar: as fresh as it can be for hardly any time."""

from __future__ import annotations

import time
from collections.abc import Callable

SHARE = 0.01
"""Part of the time that computing epsilon may take."""


class Progress:
    """What is shown of a training that goes on.

    Args:
        delta: that epsilon is asked for.
        ask: computes steps and epsilon.
    """

    def __init__(self, delta: float, ask: Callable[[], tuple[int, float]]) -> None:
        self.delta, self._ask, self._next = delta, ask, 0.0
        self._shown = 0, 0.0

    def now(self) -> tuple[int, float]:
        """Steps and epsilon, of the latest moment for which they were computed."""
        begin = time.perf_counter()
        if begin >= self._next:
            self._shown = self._ask()
            end = time.perf_counter()
            self._next = end + (end - begin) / SHARE
        return self._shown

"""What the noise of all steps together says against being the noise that is accounted.

Two kinds of evidence, which know nothing of models: the size of the noise (:class:`SizeEvidence`) and noise that was there
before (:class:`Repeats`). Both see noise in units of its standard deviation: independent standard normal numbers, if all is
well.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

FALSE_ALARM = 0.9e-9
"""Probability that the size of right noise is refused anywhere in a training, however long; repeats have the rest of 1e-9."""

RATIOS = (2.0**-10, 1 / 16, 1 / 4, 0.5, 0.7, 0.8, 0.9, 0.95, 1.05, 1.1, 1.2, 1.4, 2.0, 4.0)
"""Wrong standard deviations that evidence is collected for, as multiples of the right one."""

PRINT = 8
"""Numbers in a fingerprint."""

CELLS = 2.0**10
"""Cells in a standard deviation, that around zero twice as wide: two fingerprints are equal if all their numbers lie in the
same cells."""

KEPT = 200_000
"""Fingerprints of the model, and as many of single parameters, that are kept, about 200 bytes each."""


class SizeEvidence:
    """A sequential test of standard deviation 1, valid however often one looks.

    For every part (a parameter, or all together) and every wrong standard deviation r, ``n`` numbers with sum of squares
    ``s`` multiply a bet by their likelihood ratio ``L = r**-n * exp(s / 2 * (1 - r**-2))``, whose mean is 1 under right
    noise. At step t a new stake of ``1 / (t (t + 1))`` comes in, so that noise that becomes wrong late is found as well. With
    stakes added, ``(M_(t-1) + 1 / (t (t + 1))) * L_t`` plus the stakes still to come is a nonnegative martingale that begins
    at 1. So is the mean over parts and r (half of the weight on all together, half shared by the parameters), and by Ville's
    inequality it ever exceeds ``1 / false_alarm`` with probability ``false_alarm`` at most. The test looks at what is
    smaller, the largest term of the mean, with the larger of bet and stake in place of their sum:

        M_t = max(M_(t-1), 1 / (t (t + 1))) * L_t.

    It may be asked later than the steps were made. Which coordinates the numbers come from may depend on anything but the
    noise. (Ville 1939; mixtures over starting times: Shin, Ramdas, Rinaldo 2022, "E-detectors",
    https://arxiv.org/abs/2203.03532.)

    Wrong noise that is r times as large multiplies the right bet by ``exp(n (r**2 - 1 - log(r**2)) / 2)`` in the mean. Noise
    that becomes wrong at step t is therefore found after about

        (log(1 / false_alarm) + log(2 * 14 * parameters) + 2 log t) / ((r**2 - 1 - log(r**2)) / 2)

    numbers of that parameter, without ``parameters`` for all together. At t = 100: 13,000 numbers for 5 %, 100 for half of the
    noise; noise that is missing yields 6.9 a number, so 6 numbers in a model of ten parameters. Less than 2.5 % is never found.

    Args:
        parts: number of parameters.
        false_alarm: probability of an alarm under right noise.
    """

    def __init__(self, parts: int, false_alarm: float = FALSE_ALARM) -> None:
        ratios = np.array(RATIOS)
        shares = np.full((parts + 1, 1), 0.5 / parts)
        shares[-1] = 0.5
        self._limits = -np.log(shares / len(ratios) * false_alarm)
        self._least = float(self._limits.min())
        self._bets = np.full((parts + 1, len(ratios)), -np.inf)  # logarithms
        self._yields = np.stack([-np.log(ratios), (1 - ratios**-2) / 2])
        self._seen = np.zeros((parts + 1, 2))
        self.steps = 0

    def add(self, numbers: NDArray[np.int64], squares: NDArray[np.float64]) -> tuple[int, float] | None:
        """The noise of a step.

        Args:
            numbers: how many numbers there are of every parameter.
            squares: sums of their squares.

        Returns:
            The part that is wrong (``parts`` for all together) and about which multiple of the right standard deviation it
            has; ``None`` if nothing is known to be wrong.
        """
        self.steps += 1
        seen, bets = self._seen, self._bets
        seen[:-1, 0], seen[:-1, 1] = numbers, squares
        np.add.reduce(seen[:-1], 0, out=seen[-1])
        np.maximum(bets, -math.log(self.steps * (self.steps + 1.0)), out=bets)
        bets += seen @ self._yields
        if bets.max() < self._least:  # false for a NaN, too
            return None
        over = bets - self._limits
        if over.max() < 0:
            return None
        part, ratio = divmod(int(np.argmax(over)), len(RATIOS))
        return part, RATIOS[ratio]


Seen = tuple[int, int]
"""Where noise was seen: number of the release, number of the parameter."""


class Repeats:
    """Noise that was there before, in an earlier step or in another parameter.

    What is known of the noise has rounding errors, so that numbers are compared by cells of 1/1024 of a standard deviation.
    Two independent standard normal numbers share a cell with probability ``1.003 / (1024 * 2 sqrt(pi))`` at most, two
    fingerprints of 8 numbers with probability 4e-29: among a billion fingerprints two are equal with probability 2e-11.
    A repeat is missed where rounding moves a number over the border of a cell: one in 1000 for clipped sums of the size of
    the noise.

    The first 8 numbers of the model and those of every parameter are kept for the last steps (:data:`KEPT` fingerprints of
    either kind).

    Args:
        sizes: how many numbers every parameter has.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self._some = sum(min(n, PRINT) for n in sizes) >= PRINT
        ends = np.cumsum([min(n, PRINT) for n in sizes]).tolist()
        self._parts = [(part, end - PRINT) for part, (n, end) in enumerate(zip(sizes, ends, strict=True)) if n >= PRINT]
        self.forget()

    def forget(self) -> None:
        """What was seen may come again."""
        self._by_step: dict[bytes, Seen] = {}
        self._by_part: dict[bytes, Seen] = {}

    def add(self, noise: Sequence[float], step: int) -> tuple[Seen, Seen] | None:
        """The noise of a step.

        Args:
            noise: the first 8 numbers of every parameter, or all it has; a NaN where they are not known precisely enough.
            step: number of the release.

        Returns:
            Where noise is that was seen, and where it was seen before; ``None`` if there is no such noise.
        """
        if not self._some:
            return None
        cells = [int(x * CELLS) if -_MOST < x < _MOST else _UNKNOWN for x in noise]
        first = cells[:PRINT]
        if _UNKNOWN not in first:
            before = self._by_step.setdefault(_bytes(*first), (step, self._parts[0][0] if self._parts else 0))
            if before[0] != step:
                return (step, before[1]), before
        for part, start in self._parts:
            cells_of_part = cells[start : start + PRINT]
            if _UNKNOWN not in cells_of_part:
                here = step, part
                before = self._by_part.setdefault(_bytes(*cells_of_part), here)
                if before is not here:
                    return here, before
        for seen in (self._by_step, self._by_part):
            while len(seen) > KEPT:
                del seen[next(iter(seen))]
        return None


_UNKNOWN = 2**31 - 1
_MOST = 2.0**20
"""Standard deviations: no right noise is larger, and cells of what is smaller are 32-bit integers."""
_bytes = struct.Struct(f"{PRINT}i").pack

"""From the history of an accountant to an epsilon: never below zero, and in bounded time.

The PRV accountant is asked where its arithmetic is sound, Renyi accounting, an upper bound, everywhere else. The ``gdp``
accountant is an approximation that may lie below the truth; it answers only where the script has asked for it.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from opacus.accountants import GaussianAccountant, PRVAccountant, RDPAccountant
from opacus.accountants.analysis.rdp import compute_rdp

from dpfix.errors import ArgumentError
from dpfix.instrument.source import warn_user
from dpfix.scan.values import number, number_in, plain, shown

MOST_POINTS = 10_000_000
"""Points on which the privacy losses of a history may be discretised; about 0.6 us each, 6 s in all."""
LARGEST_LOSS = 650.0
"""Beyond it ``exp`` of a privacy loss, which the PRV accountant takes, is not a number any more (at 709)."""
SMALLEST_DELTA = 1e-8
"""Below it rounding in the PRV accountant is as large as delta: answers below the exact one were seen up to 3e-10."""
SMALLEST_NOISE = 1e-6
"""With less, epsilon is beyond 1e11 for a single step with rate 1, and is called infinite."""
LARGEST_NOISE = 1e6
"""More is read as this much, which loses nothing worth having and keeps powers of it finite."""
EPS_ERROR = 0.01
"""The default of Opacus's PRV accountant."""
MOST_ENTRIES = 50
"""Different noise levels or rates that are computed exactly; each takes up to 0.1 s."""
LARGEST_ORDER = 10_000
"""Of Renyi accounting; a whole order takes time in proportion to it."""
ORDERS = np.array(RDPAccountant.DEFAULT_ALPHAS, dtype=float)

FEW_ORDERS = (2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 63.0)
"""Enough to see that a grid is small."""
ACCURACY = ("alphas", "eps_error", "delta_error")
"""Options of Opacus's accountants that say how exactly they are asked."""

Entry = tuple[float, float, int]
"""Noise multiplier, sampling rate, steps."""


@dataclass(frozen=True)
class Spent:
    """A privacy loss.

    Attributes:
        epsilon: at least 0; infinite if any step was made without noise.
        mechanism: the accounting that it comes from.
    """

    epsilon: float
    mechanism: str


@dataclass(frozen=True)
class Accuracy:
    """How exactly an accountant is asked; what another accountant would need is left alone.

    Attributes:
        alphas: orders of Renyi accounting.
        eps_error: of the PRV accountant.
        delta_error: of the PRV accountant; a thousandth of delta if ``None``.
    """

    alphas: tuple[float, ...] = tuple(ORDERS.tolist())
    eps_error: float = EPS_ERROR
    delta_error: float | None = None

    @classmethod
    def of(cls, delta: float, *, alphas: Any = None, eps_error: Any = None, delta_error: Any = None) -> Accuracy:
        """Check what was asked for.

        Args:
            delta: of the question.
            alphas: orders, each above 1; Opacus's if ``None``.
            eps_error: Opacus's if ``None``.
            delta_error: below ``delta``; Opacus's if ``None``.

        Returns:
            The options with their defaults.

        Raises:
            ArgumentError: one is not legal.
        """
        found = cls()
        if alphas is not None:
            found = replace(found, alphas=_orders(alphas))
        if eps_error is not None:
            help = "It is by how much epsilon may be overstated; 0.01 is usual, and less takes longer."
            found = replace(found, eps_error=number_in("eps_error", eps_error, (0, 100), help, open_at="low"))
        if delta_error is not None:
            help = "It is the part of delta that the computation may use up; a thousandth of it is usual."
            legal = number_in("delta_error", delta_error, (0, delta), help, open_at="low high")
            found = replace(found, delta_error=legal)
        return found


def _orders(alphas: Any) -> tuple[float, ...]:
    given = plain(alphas)
    given = given.tolist() if isinstance(given, (np.ndarray, torch.Tensor)) else given
    found = [number(order) for order in given] if isinstance(given, (list, tuple, range)) else []
    orders = tuple(float(order) for order in found if order is not None and 1 < order <= LARGEST_ORDER)
    if not orders or len(orders) < len(found) or sum(orders) > 100 * LARGEST_ORDER:
        raise ArgumentError(
            f"alphas={shown(alphas)} is no list of orders above 1 and up to {LARGEST_ORDER}.",
            "Renyi accounting bounds epsilon at each order and takes the best.",
            "Leave it out, or pass for example alphas=[1.5, 2, 4, 8, 16, 32, 64, 128].",
            path="alphas",
        )
    return orders


def spent(accountant: Any, delta: float, accuracy: Accuracy | None = None) -> Spent:
    """The privacy loss of the steps that an accountant has counted.

    A tighter accountant hands over to Renyi accounting, which bounds the same steps from above, where it would not answer:
    the PRV accountant discretises the privacy loss on a grid that grows with epsilon, with the steps and with the number
    of different noise levels.

    Args:
        accountant: one of Opacus's.
        delta: probability that the bound does not hold.
        accuracy: how exactly it is asked.

    Returns:
        Epsilon, and the accounting that gave it.
    """
    found, reason, _ = answer(accountant, delta, accuracy or Accuracy())
    if reason:
        warn_user(
            f"the {accountant.mechanism()} accountant cannot answer here: {reason}. Epsilon comes from Renyi accounting (rdp) "
            "instead, an upper bound for the same steps that is usually looser."
        )
    return found


def answer(
    accountant: Any, delta: float, accuracy: Accuracy, most_points: float = MOST_POINTS
) -> tuple[Spent, str, float]:
    """As :func:`spent`, without a warning.

    Args:
        accountant: one of Opacus's.
        delta: probability that the bound does not hold.
        accuracy: how exactly it is asked.
        most_points: points that the grid of the PRV accountant may have.

    Returns:
        The answer, why it comes from Renyi accounting where another was asked for, and the points of the grid.
    """
    history: list[Entry] = accountant.history
    name, reason, points = accountant.mechanism(), "", 0.0
    if not history:
        return Spent(0.0, name), "", 0.0
    if not all(noise >= SMALLEST_NOISE for noise, *_ in history) or not delta > 0:  # also where it is not a number
        return Spent(math.inf, name), "", 0.0
    if isinstance(accountant, RDPAccountant):
        return Spent(renyi_epsilon(history, delta, accuracy.alphas), name), "", 0.0
    options: dict[str, Any] = {}
    if isinstance(accountant, PRVAccountant):
        reason, points = _too_much(history, delta, accuracy, most_points)
        options = {"eps_error": accuracy.eps_error, "delta_error": accuracy.delta_error}
    elif isinstance(accountant, GaussianAccountant) and len({entry[:2] for entry in history}) > 1:
        reason = "it reads the last of several settings only"
    if not reason:
        try:
            with np.errstate(all="ignore"):  # what is not finite is seen below
                epsilon = float(accountant.get_epsilon(delta, **options))
        except FAILURES as error:
            reason = _FAILED.get(name, f"it failed ({error})")
        else:
            if math.isfinite(epsilon):
                return Spent(max(0.0, epsilon), name), "", points
            reason = "its answer is not finite"
    return Spent(renyi_epsilon(history, delta, accuracy.alphas), "rdp"), reason, 0.0


FAILURES = (ValueError, RuntimeError, ArithmeticError, LookupError, TypeError, MemoryError)
"""What an accountant of Opacus raises where its arithmetic fails."""
_FAILED = {"gdp": "it looks for an epsilon between 0 and 500, and there is none"}
"""What it means that an accountant failed."""


def steps_without_noise(accountant: Any) -> int:
    """Steps in the history of one of Opacus's accountants that were released without noise.

    Returns:
        Their number.
    """
    return sum(steps for noise, _, steps in accountant.history if not noise > 0)


def renyi_epsilon(history: list[Entry], delta: float, alphas: tuple[float, ...] | None = None) -> float:
    """An upper bound on epsilon from Renyi differential privacy, in seconds for any noise and any number of steps.

    Mironov et al. 2019, https://arxiv.org/abs/1908.10530, for the Renyi divergence of a step; Balle et al. 2020,
    https://arxiv.org/abs/1905.09982, theorem 21, for epsilon. A history with many different entries is read as one with
    slightly less noise.

    Args:
        history: noise multiplier, sampling rate and number of steps of every entry.
        delta: probability that the bound does not hold.
        alphas: orders of the divergence; Opacus's if not given.

    Returns:
        Epsilon, at least 0.
    """
    orders = ORDERS if alphas is None else np.array(alphas)
    steps: Counter[tuple[float, float]] = Counter()
    history = [(min(noise, LARGEST_NOISE), rate, times) for noise, rate, times in history]
    for noise, rate, times in history if len(history) <= MOST_ENTRIES else coarser(history):
        steps[float(noise), float(rate)] += times
    divergence = sum(times * _divergence(*setting, alphas) for setting, times in steps.items())
    epsilons = divergence - (np.log(delta) + np.log(orders)) / (orders - 1) + np.log((orders - 1) / orders)
    return max(0.0, float(np.min(epsilons)))


@functools.lru_cache(maxsize=1024)
def _divergence(noise: float, rate: float, alphas: tuple[float, ...] | None) -> Any:
    """Renyi divergence of one step, for all orders."""
    return compute_rdp(
        q=rate, noise_multiplier=noise, steps=1, orders=ORDERS.tolist() if alphas is None else list(alphas)
    )


def coarser(history: list[Entry]) -> Iterator[Entry]:
    """The history with noise rounded down and rates rounded up, to powers of 1.01: few different entries, no less loss."""
    grid = math.log(1.01)
    for noise, rate, steps in history:
        coarse = math.exp(math.floor(math.log(noise) / grid) * grid), math.exp(math.ceil(math.log(rate) / grid) * grid)
        yield min(coarse[0], noise), min(max(coarse[1], rate), 1.0), steps


def _too_much(history: list[Entry], delta: float, accuracy: Accuracy, most_points: float) -> tuple[str, float]:
    """Why the PRV accountant would not answer, and the points of its grid: Gopi et al. 2021, arXiv 2106.02848."""
    if delta < SMALLEST_DELTA:
        return f"delta={delta:g} is as small as the rounding in it", 0.0
    delta_error = accuracy.delta_error or delta / 1000
    steps = sum(entry[-1] for entry in history)
    grid_points_per_loss = math.sqrt(steps * math.log(12 / delta_error) / 2) / accuracy.eps_error
    hardest = (min(noise for noise, *_ in history), max(rate for _, rate, _ in history), 1)
    largest = points = math.inf
    for orders in (FEW_ORDERS, None):  # more of them give a smaller bound, and take a hundred times longer
        single = renyi_epsilon([hardest], delta_error / (8 * steps), orders)
        largest = max(renyi_epsilon(history, delta_error / 4, orders), single) + 3
        points = 2 * largest * grid_points_per_loss * len(history)
        if largest <= LARGEST_LOSS and points <= most_points:
            return "", points
    if largest > LARGEST_LOSS:
        return f"privacy losses of up to {largest:.3g} are beyond its arithmetic", 0.0
    return f"its grid would have {points:.2g} points", 0.0

"""From the history of an accountant to an epsilon: never below zero, and in bounded time.

The PRV accountant is asked where its arithmetic is sound, Renyi accounting, an upper bound, everywhere else. The ``gdp``
accountant is an approximation that may lie below the truth; it answers only where the script has asked for it.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from opacus.accountants import GaussianAccountant, PRVAccountant, RDPAccountant, create_accountant
from opacus.accountants.analysis.rdp import compute_rdp
from opacus.accountants.utils import get_noise_multiplier

from dpfix.instrument.source import warn_user

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
ORDERS = np.array(RDPAccountant.DEFAULT_ALPHAS, dtype=float)

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


def spent(accountant: Any, delta: float) -> Spent:
    """The privacy loss of the steps that an accountant has counted.

    A tighter accountant hands over to Renyi accounting, which bounds the same steps from above, where it would not answer:
    the PRV accountant discretises the privacy loss on a grid that grows with epsilon, with the steps and with the number
    of different noise levels.

    Args:
        accountant: one of Opacus's.
        delta: probability that the bound does not hold.

    Returns:
        Epsilon, and the accounting that gave it.
    """
    loss, reason = _loss(accountant, delta)
    if reason:
        warn_user(
            f"the {accountant.mechanism()} accountant cannot answer here: {reason}. Epsilon comes from Renyi accounting (rdp) "
            "instead, an upper bound for the same steps that is usually looser."
        )
    return loss


def _loss(accountant: Any, delta: float) -> tuple[Spent, str]:
    """The privacy loss, and why it is not the accountant's own answer."""
    history: list[Entry] = accountant.history
    name, reason = accountant.mechanism(), ""
    if not history:
        return Spent(0.0, name), ""
    if not all(noise >= SMALLEST_NOISE for noise, *_ in history) or not delta > 0:  # also where it is not a number
        return Spent(math.inf, name), ""
    if isinstance(accountant, RDPAccountant):
        return Spent(renyi_epsilon(history, delta), name), ""
    if isinstance(accountant, PRVAccountant):
        reason = _too_much(history, delta)
    elif isinstance(accountant, GaussianAccountant) and len({entry[:2] for entry in history}) > 1:
        reason = "it reads the last of several settings only"
    if not reason:
        try:
            with np.errstate(all="ignore"):  # what is not finite is seen below
                epsilon = float(accountant.get_epsilon(delta))
        except (ValueError, RuntimeError, ArithmeticError) as error:
            reason = f"it failed ({error})"
        else:
            if math.isfinite(epsilon):
                return Spent(max(0.0, epsilon), name), ""
            reason = "its answer is not finite"
    return Spent(renyi_epsilon(history, delta), "rdp"), reason


def noise_within(earlier: list[Entry], *, epsilon_tolerance: float = 0.01, **search: Any) -> float:
    """The noise with which planned steps stay within a budget, of which earlier steps have spent a part.

    Args:
        earlier: the history so far.
        epsilon_tolerance: how much of the budget may be left.
        **search: ``target_epsilon`` of all steps together, ``target_delta``, ``sample_rate`` and ``steps`` of those that are
            planned, and the kind of ``accountant``, as in Opacus's ``get_noise_multiplier``.

    Returns:
        The noise multiplier.

    Raises:
        ValueError: no noise is enough.
    """
    if not earlier:
        return get_noise_multiplier(epsilon_tolerance=epsilon_tolerance, **search)
    target, accountant = search["target_epsilon"], cast(Any, create_accountant(search["accountant"]))

    def total(*noise: float) -> float:
        accountant.history = [*earlier, *((n, search["sample_rate"], search["steps"]) for n in noise)]
        return _loss(accountant, search["target_delta"])[0].epsilon

    if (so_far := total()) >= target:
        raise ValueError(
            f"the {sum(e[-1] for e in earlier)} steps that were made before have spent {so_far:.4g} already."
        )
    low, high = 0.0, 10.0
    while (spends := total(high)) > target:
        low, high = high, 2 * high
        if high > LARGEST_NOISE:
            raise ValueError("The privacy budget is too low.")
    while target - spends > epsilon_tolerance and high - low > 1e-6 * high:
        middle = (low + high) / 2
        trial = total(middle)
        if trial < target:
            high, spends = middle, trial
        else:
            low = middle
    return high


def steps_without_noise(accountant: Any) -> int:
    """Steps in the history of one of Opacus's accountants that were released without noise.

    Returns:
        Their number.
    """
    return sum(steps for noise, _, steps in accountant.history if not noise > 0)


def renyi_epsilon(history: list[Entry], delta: float) -> float:
    """An upper bound on epsilon from Renyi differential privacy, in seconds for any noise and any number of steps.

    Mironov et al. 2019, https://arxiv.org/abs/1908.10530, for the Renyi divergence of a step; Balle et al. 2020,
    https://arxiv.org/abs/1905.09982, theorem 21, for epsilon. A history with many different entries is read as one with
    slightly less noise.

    Args:
        history: noise multiplier, sampling rate and number of steps of every entry.
        delta: probability that the bound does not hold.

    Returns:
        Epsilon, at least 0.
    """
    steps: Counter[tuple[float, float]] = Counter()
    history = [(min(noise, LARGEST_NOISE), rate, times) for noise, rate, times in history]
    for noise, rate, times in history if len(history) <= MOST_ENTRIES else _coarser(history):
        steps[float(noise), float(rate)] += times
    divergence = sum(times * _divergence(*setting) for setting, times in steps.items())
    epsilons = divergence - (np.log(delta) + np.log(ORDERS)) / (ORDERS - 1) + np.log((ORDERS - 1) / ORDERS)
    return max(0.0, float(np.min(epsilons)))


@functools.lru_cache(maxsize=1024)
def _divergence(noise: float, rate: float) -> Any:
    """Renyi divergence of one step, for all orders."""
    return compute_rdp(q=rate, noise_multiplier=noise, steps=1, orders=ORDERS.tolist())


def _coarser(history: list[Entry]) -> Iterator[Entry]:
    """The history with noise rounded down and rates rounded up, to powers of 1.01: few different entries, no less loss."""
    grid = math.log(1.01)
    for noise, rate, steps in history:
        coarse = math.exp(math.floor(math.log(noise) / grid) * grid), math.exp(math.ceil(math.log(rate) / grid) * grid)
        yield min(coarse[0], noise), min(max(coarse[1], rate), 1.0), steps


def _too_much(history: list[Entry], delta: float) -> str:
    """Why the PRV accountant would not answer; its grid is that of Gopi et al. 2021, https://arxiv.org/abs/2106.02848."""
    if delta < SMALLEST_DELTA:
        return f"delta={delta:g} is as small as the rounding in it"
    delta_error = delta / 1000
    steps = sum(entry[-1] for entry in history)
    grid_points_per_loss = math.sqrt(steps * math.log(12 / delta_error) / 2) / EPS_ERROR
    hardest = (min(noise for noise, *_ in history), max(rate for _, rate, _ in history), 1)
    single = renyi_epsilon([hardest], delta_error / (8 * steps))
    largest = max(renyi_epsilon(history, delta_error / 4), single) + 3
    if largest > LARGEST_LOSS:
        return f"privacy losses of up to {largest:.3g} are beyond its arithmetic"
    points = 2 * largest * grid_points_per_loss * len(history)
    if points > MOST_POINTS:
        return f"its grid would have {points:.2g} points"
    return ""

"""How many further steps a privacy budget lasts for."""

from __future__ import annotations

import copy
from typing import Any

from dpfix.sampling.inner_loader import inner_loader
from dpfix.sampling.rate import sample_rate
from dpfix.training.epsilon import Accuracy, answer
from dpfix.training.releases import settled

MOST_STEPS = 1 << 24
"""Further steps that are looked at."""


def steps_within(private: Any, epsilon: float, delta: float) -> int:
    """Further steps, with noise and rate as they are now, after which epsilon is at most a target.

    Args:
        private: what :func:`dpfix.make_private_safe` returned.
        epsilon: the target.
        delta: probability that the bound does not hold.

    Returns:
        Their number; 0 if the next step would go beyond the target, or what was released already has.
    """
    optimizer, loader = private[1], inner_loader(private[-1])
    accountant = settled(private.privacy_engine)
    before, step = list(accountant.history), (float(optimizer.noise_multiplier), sample_rate(loader))
    trial = copy.copy(accountant)

    def within(steps: int) -> bool:
        same = bool(before) and tuple(before[-1][:2]) == step
        earlier, more = (before[:-1], before[-1][-1]) if same else (before, 0)
        trial.history = [*earlier, (*step, steps + more)]
        return answer(trial, delta, Accuracy())[0].epsilon <= epsilon

    if not within(1):
        return 0
    low, high = 1, 2
    while high < MOST_STEPS and within(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if within(middle) else (low, middle)
    return low


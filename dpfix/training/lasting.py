"""How many further steps a privacy budget lasts for."""

from __future__ import annotations

import copy
from typing import Any

from dpfix.errors import ArgumentError
from dpfix.sampling.inner_loader import inner_loader
from dpfix.sampling.rate import accounted_rate, sampling_of
from dpfix.scan.values import number_in
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
    before = list(accountant.history)
    step = float(optimizer.noise_multiplier), accounted_rate(loader, sampling_of(loader))
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


class Lasting:
    """Whether a budget lasts for another step; the search for its last step is made once per noise level.

    Args:
        private: what :func:`dpfix.make_private_safe` returned.
        target_epsilon: the budget.
        delta: its delta.
    """

    def __init__(self, private: Any, target_epsilon: Any, delta: float) -> None:
        self._private, self._target, self._delta = private, check_target(target_epsilon), delta
        self._last: tuple[float, int] | None = None  # noise, and the number of steps at which the budget is spent

    @property
    def steps(self) -> int:
        """Further steps that stay within the budget."""
        optimizer = self._private[1]
        made, noise = optimizer.guard.guarded.accounting.steps, float(optimizer.noise_multiplier)
        if self._last is None or self._last[0] != noise or made >= self._last[1]:
            self._last = noise, made + steps_within(self._private, self._target, self._delta)
        return self._last[1] - made

    def check(self) -> None:
        """Refuse a training that cannot make a step.

        Raises:
            ArgumentError: the first one would go beyond the budget.
        """
        if self.steps == 0:
            raise ArgumentError(
                f"target_epsilon={self._target:g} at delta={self._delta:g} does not last for another step:",
                f"epsilon is {self._private.get_epsilon(self._delta):.4g} now.",
                "Raise target_epsilon or noise_multiplier.",
                path="target_epsilon",
            )


def check_target(target_epsilon: Any) -> float:
    """A positive number."""
    help = "The training stops before the step that would go beyond it."
    return number_in("target_epsilon", target_epsilon, (0, float("inf")), help, open_at="low high")

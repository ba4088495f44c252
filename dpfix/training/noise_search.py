"""The noise that reaches a privacy budget, in bounded time whatever the budget."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

from dpfix.errors import ArgumentError
from dpfix.instrument.source import warn_user
from dpfix.scan.values import number_in
from dpfix.training.epsilon import MOST_POINTS, Accuracy, Entry, Spent, answer, renyi_epsilon

LARGEST_NOISE = 1e6
"""A budget that is not reached with this much is too low."""
EPSILON_TOLERANCE = 0.01
"""How far below the budget epsilon may end up; Opacus's default."""
CLOSE = 1e-7
"""Relative width of the interval of noise at which the search ends, also if epsilon jumps in it."""


@dataclass(frozen=True)
class Target:
    """A privacy budget, and the steps that it has to last for.

    Attributes:
        epsilon: at most this much.
        delta: probability that the bound does not hold.
        sample_rate: of every step.
        steps: their number.
        earlier: what was spent before, as an accountant's history.
        tolerance: how far below the budget epsilon may end up.
        accuracy: how exactly the accountant is asked.
    """

    epsilon: float
    delta: float
    sample_rate: float
    steps: int
    earlier: tuple[Entry, ...] = ()
    tolerance: float = EPSILON_TOLERANCE
    accuracy: Accuracy = field(default_factory=Accuracy)


def tolerance_of(value: Any) -> float:
    """The option ``epsilon_tolerance`` of the search, a positive number."""
    help = "It is how far below target_epsilon the search may end; 0.01 is usual."
    return number_in("epsilon_tolerance", value, (0, float("inf")), help, open_at="low")


def noise_for(budget: Target, accountant: Any) -> float:
    """The smallest noise multiplier found whose steps stay within the budget.

    It is Opacus's ``get_noise_multiplier`` with the same steps of bisection. The PRV accountant is asked as long as its grids
    have ten million points in all (about six seconds); where it would take more, Renyi accounting, an upper bound, answers.

    Args:
        budget: the budget.
        accountant: one of Opacus's; it is not changed.

    Returns:
        The noise multiplier.

    Raises:
        ArgumentError: no noise reaches the budget.
    """
    search = _Search(budget, accountant)
    if budget.earlier and (so_far := search.spent().epsilon) >= budget.epsilon:
        made = sum(entry[-1] for entry in budget.earlier)
        raise ArgumentError(
            f"target_epsilon={budget.epsilon:g} at target_delta={budget.delta:g} cannot be reached:",
            f"the {made} steps that were made before have spent {so_far:.4g} already.",
            "The earlier steps alone have spent more. Raise target_epsilon.",
            path="target_epsilon",
        )
    low, high = 0.0, 10.0
    found = None
    while found is None or not found.epsilon <= budget.epsilon:
        high *= 2
        if high > 2 * LARGEST_NOISE:
            raise ArgumentError(
                f"target_epsilon={budget.epsilon:g} at target_delta={budget.delta:g} cannot be reached in {budget.steps} steps "
                f"with a sampling rate of {budget.sample_rate:.3g}:",
                f"the {search.name} accountant still says {'nothing' if found is None else f'{found.epsilon:.3g}'} with a "
                f"noise multiplier of {high / 2:.3g}.",
                _way_out(budget, search.name),
                path="target_epsilon",
            )
        found = search.spent(high)
    while budget.epsilon - found.epsilon > budget.tolerance and high - low > CLOSE * high:
        middle = (low + high) / 2
        tried = search.spent(middle)
        if tried.epsilon < budget.epsilon:
            high, found = middle, tried
        else:
            low = middle
    if found.mechanism != search.name:
        warn_user(
            f"the {search.name} accountant would take too long, or cannot answer, at target_epsilon={budget.epsilon:g} with "
            f"{budget.steps} steps. The noise comes from Renyi accounting (rdp) instead, an upper bound that asks for a little "
            "more noise."
        )
    return high


class _Search:
    """Asks an accountant about one noise after another, within a number of grid points."""

    def __init__(self, budget: Target, accountant: Any) -> None:
        self.name: str = accountant.mechanism()
        self._budget, self._accountant, self._points = budget, copy.copy(accountant), float(MOST_POINTS)

    def spent(self, *noise: float) -> Spent:
        """The privacy loss of the whole training with this noise; without one, of what was spent before."""
        budget = self._budget
        self._accountant.history = [*budget.earlier, *((n, budget.sample_rate, budget.steps) for n in noise)]
        found, _, points = answer(self._accountant, budget.delta, budget.accuracy, self._points)
        self._points -= points
        return found


def _way_out(budget: Target, name: str) -> str:
    """What helps: another accuracy, another accountant, or less to account for."""
    history = [*budget.earlier, (LARGEST_NOISE, budget.sample_rate, budget.steps)]
    if name == "prv" and budget.accuracy.eps_error > budget.epsilon / 10:
        own = f"{budget.accuracy.eps_error:g} of epsilon is the accountant's own error"
        return f"Pass eps_error={budget.epsilon / 10:.1g}: {own}."
    if name != "prv" and renyi_epsilon(history, budget.delta) > budget.epsilon:
        return "Use SafePrivacyEngine(accountant='prv'), which states small epsilons more tightly, or raise target_epsilon."
    return "Raise target_epsilon, train fewer epochs, or use a smaller batch_size (a lower sampling rate)."

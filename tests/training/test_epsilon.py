"""Epsilon is never below zero, never below the truth, and always comes: in seconds, for any noise."""

from __future__ import annotations

import itertools
import math
import time
import warnings
from typing import Any

import pytest
from opacus import PrivacyEngine
from opacus.accountants import PRVAccountant, RDPAccountant
from opacus.accountants.accountant import IAccountant
from scipy import optimize, stats

import dpfix
from dpfix.training.epsilon import renyi_epsilon, spent
from tests.helpers import setting, train

ENGINES = {
    "safe": dpfix.SafePrivacyEngine,
    "opacus": PrivacyEngine,
    "opacus, rdp": lambda: PrivacyEngine(accountant="rdp"),
    "opacus, gdp": lambda: PrivacyEngine(accountant="gdp"),
}
every_engine = pytest.mark.parametrize("engine", ENGINES)
pytestmark = [
    pytest.mark.filterwarnings("ignore:GDP accounting is experimental"),
    pytest.mark.filterwarnings("ignore:Optimal order is the"),  # Opacus's, about its own grid of orders
]


def start(engine: str, **options: Any) -> dpfix.PrivateTraining:
    return dpfix.make_private_safe(**setting(privacy_engine=ENGINES[engine](), **options))


def both(training: dpfix.PrivateTraining, delta: float) -> list[float]:
    """What the training and its engine answer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dpfix.DPFixWarning)
        return [training.get_epsilon(delta), training.privacy_engine.get_epsilon(delta)]


def history(entries: list[tuple[float, float, int]], kind: type[IAccountant] = PRVAccountant) -> Any:
    accountant = kind()
    accountant.history = entries
    return accountant


def gaussian(noise: float, steps: int, delta: float) -> float:
    """Epsilon of steps in which every sample takes part: Balle and Wang 2018, https://arxiv.org/abs/1805.06530."""
    mu = math.sqrt(steps) / noise

    def surplus(epsilon: float) -> float:
        second = math.exp(epsilon + stats.norm.logcdf(-epsilon / mu - mu / 2))
        return float(stats.norm.cdf(-epsilon / mu + mu / 2)) - second - delta

    if surplus(0.0) <= 0:
        return 0.0
    return optimize.brentq(surplus, 0, mu**2 / 2 + 20 * mu)  # type: ignore[return-value]


@every_engine
def test_epsilon_is_never_negative(engine: str) -> None:
    training = start(engine, noise_multiplier=8.0)
    train(training, 1)
    for delta in (0.3, 0.6, 0.99):
        assert all(0 <= epsilon < 1 for epsilon in both(training, delta))


@every_engine
def test_before_the_first_step_nothing_is_lost(engine: str) -> None:
    assert both(start(engine), 1e-3) == [0, 0]


@pytest.mark.parametrize("engine", ["safe", "opacus", "opacus, rdp"])  # gdp refuses any change of the noise
def test_a_step_without_noise_is_no_privacy_for_ever(engine: str) -> None:
    training = start(engine)
    train(training, 2)
    assert all(0 < epsilon < math.inf for epsilon in both(training, 1e-3))
    training[1].noise_multiplier = 0.0
    train(training, 3)
    training[1].noise_multiplier = 2.0
    train(training, 1)
    assert both(training, 1e-3) == [math.inf, math.inf]
    statement = training.statement(1e-3)
    assert statement.epsilon == math.inf
    assert "3 of 6 steps were made without noise: there is no privacy" in statement.cautions


@every_engine
@pytest.mark.parametrize("noise", [1e-6, 0.01, 0.03])
def test_tiny_noise_is_answered_in_seconds(engine: str, noise: float) -> None:
    training = start(engine, noise_multiplier=noise)
    train(training, 3)
    begun = time.perf_counter()
    first, second = both(training, 1e-3)
    assert time.perf_counter() - begun < 5
    assert 1 / noise**2 < first == second < math.inf  # 1 / (2 noise^2) for every step that a sample takes part in


def test_who_gave_the_number_is_said() -> None:
    training = start("safe", noise_multiplier=0.01)
    train(training, 3)
    with pytest.warns(dpfix.DPFixWarning, match=r"prv accountant cannot answer.*Renyi accounting \(rdp\)"):
        statement = training.statement(1e-3)
    assert statement.accountant == "rdp"


@pytest.mark.parametrize(
    "entries",
    [[(0.5, 0.01, 1_000_000)], [(0.01, 0.5, 1), (1.0, 0.01, 1000)]],
    ids=["many steps", "one step with tiny noise"],
)
def test_large_grids_are_left_to_renyi_accounting(entries: list[tuple[float, float, int]]) -> None:
    begun = time.perf_counter()
    with pytest.warns(dpfix.DPFixWarning, match="usually looser"):
        loss = spent(history(entries), 1e-5)
    assert time.perf_counter() - begun < 5
    assert loss.mechanism == "rdp"
    assert loss.epsilon == history(entries, RDPAccountant).get_epsilon(1e-5)


def test_a_noise_for_every_step_is_answered_too() -> None:
    """Read as slightly less noise, so that the number is never too small."""
    begun = time.perf_counter()
    with pytest.warns(dpfix.DPFixWarning, match="usually looser"):
        loss = spent(history([(0.8 + i / 1e5, 0.02, 1) for i in range(40_000)]), 1e-5)
    assert time.perf_counter() - begun < 10
    finer = renyi_epsilon([(0.8 + i / 25, 0.02, 4000) for i in range(1, 11)], 1e-5)
    coarser = renyi_epsilon([(0.8 + i / 25, 0.02, 4000) for i in range(10)], 1e-5)
    assert finer < loss.epsilon < coarser


@pytest.mark.parametrize("entries", [[(1.0, 0.01, 1000)], [(0.3, 0.01, 100)], [(1.0, 0.01, 500), (1.3, 0.02, 500)]])
def test_ordinary_trainings_keep_their_accountant(entries: list[tuple[float, float, int]]) -> None:
    for kind in (PRVAccountant, RDPAccountant):
        accountant = history(entries, kind)
        loss = spent(accountant, 1e-5)
        assert loss.mechanism == accountant.mechanism()
        assert loss.epsilon == accountant.get_epsilon(1e-5)


@pytest.mark.parametrize("noise", [1e-3, 0.01, 0.05, 0.3, 1.0, 10.0])
@pytest.mark.parametrize("steps", [1, 8, 1000])
def test_renyi_accounting_is_an_upper_bound(noise: float, steps: int) -> None:
    """Where every sample takes part, the truth has a formula; less of it is never more than that."""
    for delta in (1e-9, 1e-5, 0.1):
        bounds = [renyi_epsilon([(noise, rate, steps)], delta) for rate in (1.0, 0.5, 0.01)]
        assert bounds[0] >= gaussian(noise, steps, delta) * (1 - 1e-9)
        assert all(b <= a * (1 + 1e-9) for a, b in itertools.pairwise(bounds))


@pytest.mark.parametrize(
    ("noise", "steps", "delta"), [(226.30507551910995, 205154, 3.123010679657936e-10), (56.1806, 35971, 2.38e-12)]
)
def test_tiny_deltas_are_not_asked_of_the_prv_accountant(noise: float, steps: int, delta: float) -> None:
    with pytest.warns(dpfix.DPFixWarning, match="as small as the rounding in it"):
        found = spent(history([(noise, 1.0, steps)]), delta)
    assert found.epsilon >= gaussian(noise, steps, delta) and found.mechanism == "rdp"


@pytest.mark.parametrize("kind", [PRVAccountant, RDPAccountant])
@pytest.mark.parametrize("noise", [1e-170, 1e-155, 1e160, math.nan])
def test_absurd_noise_is_answered(kind: type[IAccountant], noise: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = spent(history([(noise, 0.01, 10)], kind), 1e-5).epsilon
    assert found == math.inf if not noise > 1 else 0 <= found < 0.3  # the largest order of the grid bounds it


def test_many_noise_levels_are_answered_by_renyi_accounting_too() -> None:
    entries = [(1.0 + k / 1000, 0.01, 1) for k in range(1000)]
    found = spent(history(entries, RDPAccountant), 1e-5).epsilon
    assert spent(history([(2.0, 0.01, 1000)], RDPAccountant), 1e-5).epsilon < found
    assert found < spent(history([(0.98, 0.01, 1000)], RDPAccountant), 1e-5).epsilon

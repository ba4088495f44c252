"""Epsilon is never below zero, never below the truth, and always comes: in seconds, for any noise."""

from __future__ import annotations

import itertools
import math
import time
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from opacus import PrivacyEngine
from opacus.accountants import PRVAccountant, RDPAccountant
from opacus.accountants.accountant import IAccountant
from opacus.accountants.utils import get_noise_multiplier
from scipy import optimize, stats

import dpfix
from dpfix.training.epsilon import renyi_epsilon, spent
from dpfix.training.noise_search import Target, noise_for
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


# ------------------------------------------------------------------ how exactly an accountant is asked


@pytest.mark.parametrize("kind", [PRVAccountant, RDPAccountant])
def test_options_of_the_accountants_are_passed_on(kind: type[IAccountant]) -> None:
    training = dpfix.make_private_safe(**setting(privacy_engine=PrivacyEngine(accountant=kind.mechanism())))
    train(training, 3)
    accountant = training.privacy_engine.accountant
    for options in ({"eps_error": 0.1}, {"delta_error": 1e-4}, {"alphas": [2, 3.5]}):
        wanted = accountant.get_epsilon(1e-3, **options)
        found = training.get_epsilon(1e-3, **options)
        assert found == training.privacy_engine.get_epsilon(1e-3, **options) == pytest.approx(wanted, rel=1e-12)
    told = {"eps_error": 0.1} if kind is PRVAccountant else {"alphas": [2, 3.5]}
    assert training.get_epsilon(1e-3, **told) != training.get_epsilon(1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"eps_error": 0}, {"eps_error": "x"}, {"eps_error": math.nan}, {"delta_error": 1e-2}, {"delta_error": 0},
        {"alphas": []}, {"alphas": [1.0]}, {"alphas": 3}, {"alphas": [2, "x"]}, {"alphas": [1e9]}, {"alphas": [math.inf]},
    ],
)  # fmt: skip
def test_illegal_options_are_refused(options: dict[str, Any]) -> None:
    training = dpfix.make_private_safe(**setting())
    for ask in (training.get_epsilon, training.privacy_engine.get_epsilon):
        with pytest.raises(dpfix.ArgumentError, match=next(iter(options))):
            ask(1e-3, **options)
    with pytest.raises(dpfix.UnknownArgumentError, match="eps_eror"):
        training.privacy_engine.get_epsilon(1e-3, eps_eror=0.1)


def test_what_gdp_cannot_count_is_told_and_nothing_is_forgotten() -> None:
    training = start("opacus, gdp")
    train(training, 2)
    training[1].noise_multiplier = 2.0
    before = [p.detach().clone() for p in training[0].parameters()]
    with pytest.raises(dpfix.MisuseError, match=r"gdp accountant cannot count this step.*noise_multiplier=2.0"):
        train(training, 1)
    assert [entry[-1] for entry in training.privacy_engine.accountant.history] == [2]
    assert all(map(torch.equal, training[0].parameters(), before))


def test_gdp_says_in_words_what_it_cannot_answer() -> None:
    training = start("opacus, gdp", noise_multiplier=1e-3)
    train(training, 2)
    with pytest.warns(dpfix.DPFixWarning, match="it looks for an epsilon between 0 and 500"):
        assert training.get_epsilon(1e-3) > 500


# ------------------------------------------------------------------ the search for the noise


def with_budget(engine: str = "safe", **changes: Any) -> dpfix.PrivateTraining:
    given = setting(grad_sample_mode="bookkeeping", target_epsilon=5.0, target_delta=1e-3, epochs=4) | changes
    del given["noise_multiplier"]
    return dpfix.make_private_safe_with_epsilon(privacy_engine=ENGINES[engine](), **given)


@every_engine
@pytest.mark.parametrize("epsilon", [0.5, 5.0])
def test_the_noise_is_that_of_opacus(engine: str, epsilon: float) -> None:
    accountant = ENGINES[engine]().accountant
    wanted = get_noise_multiplier(
        target_epsilon=epsilon, target_delta=1e-3, sample_rate=8 / 24, steps=12, accountant=accountant.mechanism()
    )
    assert noise_for(Target(epsilon, 1e-3, 8 / 24, 12), accountant) == wanted


def test_the_call_searches_with_what_it_is_given() -> None:
    wanted = noise_for(Target(5.0, 1e-3, 8 / 24, 12, tolerance=0.5), PRVAccountant())
    assert with_budget(epsilon_tolerance=torch.tensor(0.5))[1].noise_multiplier == wanted


@pytest.mark.filterwarnings("ignore:the .* accountant would take too long")
@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize(("epsilon", "epochs"), [(1e3, 4), (1e6, 4), (1e12, 4), (8.0, 1e5), (8.0, 1e7), (300.0, 1000)])
@pytest.mark.parametrize("engine", ["safe", "opacus, rdp", "opacus, gdp"])
def test_every_search_ends_within_seconds(engine: str, epsilon: float, epochs: float) -> None:
    begun, accountant = time.process_time(), ENGINES[engine]().accountant
    noise = noise_for(Target(epsilon, 1e-3, 8 / 24, math.ceil(3 * epochs)), accountant)
    assert time.process_time() - begun < 10
    assert renyi_epsilon([(noise / 2, 8 / 24, math.ceil(3 * epochs))], 1e-3) > epsilon, "twice the noise that is needed"


def test_who_gave_the_noise_is_said() -> None:
    with pytest.warns(dpfix.DPFixWarning, match=r"prv accountant would take too long.*Renyi accounting \(rdp\)"):
        noise_for(Target(1e5, 1e-3, 8 / 24, 12), PRVAccountant())


@pytest.mark.parametrize(
    ("engine", "epsilon", "words"),
    [("safe", 0.005, r"eps_error=0.0005"), ("opacus, rdp", 0.01, r"accountant='prv'"), ("opacus, rdp", 1e-9, "target_epsilon")],
)  # fmt: skip
def test_a_budget_out_of_reach_is_refused_with_a_way_out(engine: str, epsilon: float, words: str) -> None:
    with pytest.raises(dpfix.ArgumentError, match=words):
        noise_for(Target(epsilon, 1e-3, 8 / 24, 12), ENGINES[engine]().accountant)


def test_the_way_out_works() -> None:
    found = with_budget(target_epsilon=0.005, eps_error=0.0005, epsilon_tolerance=0.001)
    assert found[1].noise_multiplier > 100


def test_what_was_spent_before_counts() -> None:
    fresh = Target(5.0, 1e-3, 1 / 3, 12)
    spent_before = replace(fresh, earlier=((1.5, 1 / 3, 6),))
    assert noise_for(spent_before, PRVAccountant()) > noise_for(fresh, PRVAccountant())
    with pytest.raises(dpfix.ArgumentError, match="The earlier steps alone have spent more"):
        noise_for(replace(fresh, earlier=((0.1, 1 / 3, 6),)), PRVAccountant())

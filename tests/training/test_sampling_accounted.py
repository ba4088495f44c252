"""Epsilon for the batches that were drawn: closed forms, Opacus's accountants and Google's library beside what dpfix says."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from dp_accounting.pld import privacy_loss_distribution as library
from opacus.accountants import PRVAccountant, RDPAccountant
from opacus.utils.batch_memory_manager import BatchMemoryManager
from scipy.stats import norm
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, WeightedRandomSampler

import dpfix
from dpfix.sampling.rate import LARGER, largest_batch
from dpfix.training.epsilon import SMALLEST_DELTA, Accuracy, answer
from dpfix.training.pld_accountant import PLDAccountant, pld_epsilon
from tests.helpers import points, setting

DELTA = 1e-3
NOISE = 2.0


def gaussian(mu: float, delta: float = DELTA) -> float:
    """Epsilon of a Gaussian mechanism with sensitivity over noise ``mu``: Balle and Wang 2018, theorem 8, by bisection."""
    low, high = 0.0, 1000.0
    for _ in range(100):
        middle = (low + high) / 2
        spent = norm.cdf(mu / 2 - middle / mu) - math.exp(middle + norm.logcdf(-mu / 2 - middle / mu))
        low, high = (middle, high) if spent > delta else (low, middle)
    return high


def loader(**options: object) -> DataLoader:
    return DataLoader(points(), **({"batch_size": 8, "shuffle": True} | options))  # type: ignore[arg-type]


def train(passes: float = 2, **changes: object) -> dpfix.PrivateTraining:
    """Some passes over 24 samples in 3 batches."""
    training = dpfix.make_private_safe(**setting(**({"noise_multiplier": NOISE, "data_loader": loader()} | changes)))
    model, optimizer, data = training
    left = round(passes * len(data))
    while left:
        for x, y in data:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            left -= 1
            if not left:
                break
    return training


# ------------------------------------------------------------------ the loader's own order


@pytest.mark.parametrize("accountant", ["prv", "rdp", "pld"])
@pytest.mark.parametrize(("sampling", "releases"), [("shuffle", 2), ("fixed", 6)])
def test_what_is_drawn_without_chance_has_a_closed_form(sampling: str, releases: int, accountant: str) -> None:
    training = train(sampling=sampling, accountant=accountant)
    exact = gaussian(math.sqrt(releases) / NOISE)
    told = training.get_epsilon(DELTA)
    assert exact <= told <= exact * (1.15 if accountant == "rdp" else 1.01)
    assert training.privacy_engine.get_epsilon(DELTA) == told  # Opacus reads what holds, too
    assert training.privacy_engine.accountant.history == [(NOISE, 1.0, releases)]


def test_poisson_sampling_off_is_accounted_in_full() -> None:
    """Opacus reports the epsilon of Poisson batches, which shuffled ones do not have."""
    told = train(poisson_sampling=False).get_epsilon(DELTA)
    opacus = PRVAccountant()
    opacus.history = [(NOISE, 1 / 3, 6)]
    assert opacus.get_epsilon(DELTA) < gaussian(math.sqrt(6) / NOISE) <= told


def test_the_report_says_what_a_loader_of_its_own_costs() -> None:
    report = dpfix.diagnose(**_described(poisson_sampling=False))
    assert "DPF031" in {f.code for f in report.findings} and "accounted in full" in report.details()
    assert "DPF031" not in {f.code for f in dpfix.diagnose(**_described(sampling="shuffle")).findings}


def _described(**changes: object) -> dict[str, object]:
    given = setting(data_loader=loader(), **changes)
    return {k: v for k, v in given.items() if k not in {"noise_multiplier", "max_grad_norm"}}


def test_a_pass_that_is_left_counts_as_one() -> None:
    training = train(1, sampling="shuffle")
    model, optimizer, data = training
    for _ in range(2):
        x, y = next(iter(data))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert training.privacy_engine.accountant.history == [(NOISE, 1.0, 3)]


def test_less_noise_within_a_pass_is_counted() -> None:
    training = dpfix.make_private_safe(**setting(noise_multiplier=NOISE, data_loader=loader(), sampling="shuffle"))
    model, optimizer, data = training
    for number, (x, y) in enumerate(data):
        optimizer.noise_multiplier = (2.0, 1.0, 4.0)[number]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert training.privacy_engine.accountant.history == [(2.0, 1.0, 1), (1.0, 1.0, 1)]


def test_batches_that_are_skipped_count_with_their_pass() -> None:
    training = dpfix.make_private_safe(**setting(noise_multiplier=NOISE, data_loader=loader(), sampling="shuffle"))
    for _ in range(2):
        assert len(list(training[2])) == 3
    with pytest.warns(dpfix.DPFixWarning, match="skipped"):
        assert training.get_epsilon(DELTA) >= gaussian(math.sqrt(2) / NOISE)
    assert training.privacy_engine.accountant.history == [(NOISE, 1.0, 2)]


def test_shuffle_has_every_sample_once_and_in_the_loaders_order() -> None:
    training = dpfix.make_private_safe(**setting(data_loader=loader(shuffle=False), sampling="shuffle"))
    seen = torch.cat([x for x, _ in training[2]])
    assert torch.equal(seen, points().tensors[0])


def test_a_batch_is_released_once_with_shuffle() -> None:
    training = train(1, sampling="shuffle")
    model, optimizer, data = training
    x, y = next(iter(data))
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(x), y).backward()
    with pytest.raises(dpfix.ForeignBatchError):
        optimizer.step()


@pytest.mark.parametrize(
    "sampler",
    [
        lambda: RandomSampler(points(), replacement=True),
        lambda: RandomSampler(points(), num_samples=48),
        lambda: WeightedRandomSampler([1.0] * 24, 24),
    ],
)
def test_shuffle_refuses_what_repeats_samples(sampler) -> None:
    with pytest.raises(dpfix.LoaderError):
        train(sampling="shuffle", data_loader=loader(shuffle=False, sampler=sampler()))


def test_a_sampler_that_begins_to_repeat_is_refused_as_it_draws() -> None:
    training = dpfix.make_private_safe(**setting(data_loader=loader(shuffle=False), sampling="shuffle"))
    vars(training[2])["batch_sampler"] = [[0, 1, 2], [2, 3]]
    with pytest.raises(dpfix.LoaderError, match="twice in one pass"):
        list(training[2])


def train_in_parts(training: dpfix.PrivateTraining, size: int) -> None:
    """One pass whose batches a manager splits."""
    model, optimizer, data = training
    with BatchMemoryManager(data_loader=data, max_physical_batch_size=size, optimizer=optimizer) as parts:
        for x, y in parts:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()


@pytest.mark.parametrize("sampling", ["shuffle", "truncated"])
def test_a_batch_memory_manager_splits_what_is_drawn(sampling: str) -> None:
    training = dpfix.make_private_safe(**setting(noise_multiplier=NOISE, data_loader=loader(), sampling=sampling))
    train_in_parts(training, 3)
    assert training.privacy_engine.accountant.history == [
        (NOISE, 1.0, 1) if sampling == "shuffle" else (NOISE, 1 / 3, 3)
    ]


def test_the_same_call_again_goes_on_with_its_order() -> None:
    first = train(1, sampling="shuffle")
    again = train(1, module=first[0], optimizer=first[1], data_loader=first[2], sampling="shuffle")
    assert again.privacy_engine.accountant.history == [(NOISE, 1.0, 2)]


# ------------------------------------------------------------------ samples that are in a release several times


class Twice(BatchSampler):
    """Every batch has its first index twice."""

    def __init__(self) -> None:
        super().__init__(SequentialSampler(points()), 8, False)

    def __iter__(self):
        for indices in super().__iter__():
            yield [indices[0], *indices]


def test_a_sample_that_is_twice_in_a_batch_counts_twice() -> None:
    data = DataLoader(points(), batch_sampler=Twice())
    training = train(1, sampling="fixed", data_loader=data)
    assert training.privacy_engine.accountant.history == [(NOISE / 2, 1.0, 3)]
    assert training.get_epsilon(DELTA) >= gaussian(2 * math.sqrt(3) / NOISE)


def test_a_sample_that_is_twice_in_a_batch_of_parts_counts_twice() -> None:
    training = dpfix.make_private_safe(
        **setting(noise_multiplier=NOISE, data_loader=DataLoader(points(), batch_sampler=Twice()), sampling="fixed")
    )
    train_in_parts(training, 1)
    assert training.privacy_engine.accountant.history == [(NOISE / 2, 1.0, 3)]


@pytest.mark.parametrize("virtual", [False, True], ids=["backward", "skipped steps"])
def test_accumulated_batches_count_as_often_as_a_sample_may_be_in_them(virtual: bool) -> None:
    """The loop may have the same batch in both; nothing says that it does not."""
    training = dpfix.make_private_safe(**setting(noise_multiplier=NOISE, data_loader=loader(), sampling="fixed"))
    model, optimizer, data = training
    x, y = next(iter(data))
    for last in (False, True):
        torch.nn.functional.cross_entropy(model(x), y).backward()
        if virtual:
            optimizer.signal_skip_step(do_skip=not last)
            optimizer.step()
            optimizer.zero_grad()
    if not virtual:
        optimizer.step()
    assert training.privacy_engine.accountant.history == [(NOISE / 2, 1.0, 1)]


# ------------------------------------------------------------------ Poisson draws, cut or not


@pytest.mark.parametrize(
    ("noise", "rate", "steps"), [(1.0, 0.01, 2000), (0.8, 0.1, 100), (4.0, 0.5, 50), (2.0, 1.0, 10)]
)
def test_pld_is_near_opacus_and_never_below_what_holds(noise: float, rate: float, steps: int) -> None:
    history = [(noise, rate, steps)]
    told = pld_epsilon(history, 1e-5)
    prv, rdp = PRVAccountant(), RDPAccountant()
    prv.history = rdp.history = history
    with np.errstate(all="ignore"):
        prv_low, _, prv_high = prv._get_dprv(0.01, 1e-8).compute_epsilon(1e-5, 1e-8, 0.01)
    assert prv_low <= told <= prv_high and told <= rdp.get_epsilon(1e-5)
    if rate == 1:
        assert gaussian(math.sqrt(steps) / noise, 1e-5) <= told


def test_several_settings_are_composed() -> None:
    history = [(1.0, 0.05, 100), (2.0, 0.1, 50), (3.0, 1.0, 2)]
    prv = PRVAccountant()
    prv.history = history
    with np.errstate(all="ignore"):
        low, _, high = prv._get_dprv(0.01, 1e-8).compute_epsilon(1e-5, 1e-8, 0.01)
    assert low <= pld_epsilon(history, 1e-5) <= high
    many = [(1 + k / 1000, 0.05, 1) for k in range(200)]  # a schedule: rounded to less noise, never to more
    assert pld_epsilon([(1.2, 0.05, 200)], 1e-5) < pld_epsilon(many, 1e-5) <= pld_epsilon([(0.99, 0.05, 200)], 1e-5)


@pytest.mark.parametrize("noise", [1e-3, 0.05, 1e7])
def test_pld_answers_in_seconds_whatever_the_noise(noise: float) -> None:
    accountant = PLDAccountant()
    accountant.history = [(noise, 0.1, 1000)]
    told, _, _ = answer(accountant, 1e-5, Accuracy())
    assert told.epsilon < 1e-3 if noise > 1 else math.inf > told.epsilon > 100


@pytest.mark.parametrize(("samples", "size", "steps"), [(10_000, 256, 500), (500, 32, 1000), (24, 8, 6)])
def test_a_largest_batch_costs_nothing(samples: int, size: int, steps: int) -> None:
    rate = size / samples
    largest = largest_batch(rate, samples)
    exact = library.from_truncated_subsampled_gaussian_mechanism(samples, rate, largest, 1.0).self_compose(steps)
    assert exact.get_epsilon_for_delta(1e-6) == pytest.approx(pld_epsilon([(1.0, rate, steps)], 1e-6), rel=1e-4)
    assert steps * LARGER * math.exp(20) < SMALLEST_DELTA * 1e-9
    assert largest <= max(samples, 1) and (largest == samples or largest < size + 15 * math.sqrt(size) + 40)


def test_draws_are_cut_by_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpfix.sampling.poisson.largest_batch", lambda rate, population: 9)
    training = dpfix.make_private_safe(**setting(data_loader=loader(), sampling="truncated", seed=1))
    samples = points().tensors[0]
    training[1].guard.guarded.accounting.end()  # nothing is trained here, and that is not what is looked at
    sizes, seen = [], torch.zeros(24)
    for _ in range(200):
        for x, _ in training[2]:
            sizes.append(len(x))
            seen += torch.tensor([bool((samples[i] == x).all(1).any()) for i in range(24)])
    assert max(sizes) == 9 and sizes.count(9) > 100
    assert seen.std() / seen.mean() < 0.12  # every place in the data set is cut as often


# ------------------------------------------------------------------ noise for a budget


@pytest.mark.parametrize("sampling", ["poisson", "truncated", "shuffle", "fixed"])
@pytest.mark.parametrize("accountant", ["prv", "pld"])
def test_the_noise_for_a_budget_fits_the_sampling(sampling: str, accountant: str) -> None:
    given = setting(data_loader=loader(), sampling=sampling, accountant=accountant)
    given.pop("noise_multiplier")
    training = dpfix.make_private_safe_with_epsilon(**given, target_epsilon=3.0, target_delta=DELTA, epochs=2)
    assert training.privacy_engine.accountant.mechanism() == accountant
    model, optimizer, data = training
    for _ in range(2):
        for x, y in data:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert 2.9 <= training.get_epsilon(DELTA) <= 3.0


def test_an_accountant_that_is_not_there() -> None:
    with pytest.raises(dpfix.ArgumentError, match="'pdl' is not one of"):
        dpfix.make_private_safe(**setting(accountant="pdl"))
    with pytest.raises(dpfix.ArgumentError, match="whose accountant is 'rdp'"):
        dpfix.make_private_safe(**setting(accountant="pld", privacy_engine=dpfix.SafePrivacyEngine(accountant="rdp")))


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpfix.training.pld_accountant.find_spec", lambda name: None)
    with pytest.raises(dpfix.ArgumentError, match=r"dp-accounting.*\n?.*dpfix\[accounting\]"):
        dpfix.SafePrivacyEngine(accountant="pld")


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"sampling": "possion"}, "Did you mean 'poisson'"),
        ({"sampling": "truncated", "poisson_sampling": False}, "sampling='truncated' with poisson_sampling=False"),
        ({"sampling": 3}, "sampling=3 is not one of"),
    ],
)
def test_sampling_is_one_of_four(given: dict[str, object], text: str) -> None:
    with pytest.raises(dpfix.ArgumentError, match=text):
        dpfix.make_private_safe(**setting(**given))


# ------------------------------------------------------------------ the statement


@pytest.mark.parametrize(("sampling", "said"), [("shuffle", "every sample once a pass"), ("fixed", "every release")])
def test_the_statement_says_how_batches_were_drawn(sampling: str, said: str) -> None:
    text = str(train(sampling=sampling).statement(DELTA))
    assert said in text and "zero-out adjacency" in text and re.search(r"sampling rate: +1\n", text)

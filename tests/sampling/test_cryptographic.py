"""Secure mode: noise and draws from the operating system's cryptographic generator."""

from __future__ import annotations

import copy
import math
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler

import dpfix
from dpfix.sampling import cryptographic
from dpfix.sampling.cryptographic import Cryptographic
from dpfix.sampling.randomness import Given, Stream
from dpfix.training.privacy_engine import secure_source
from tests.helpers import assert_same_generators, generator_states, points, setting
from tests.sampling.test_randomness import WAYS, drawn, epoch, in_children, private

CPU = torch.device("cpu")
SOURCE = Cryptographic()


def numbers(count: int = 200_000) -> np.ndarray:
    return SOURCE.normal(count, CPU).numpy()


# ------------------------------------------------------------------ the numbers; wrong alarms of one test: 1e-6 at most


def test_normal_numbers_are_normal() -> None:
    found = numbers(400_000)
    assert abs(found.mean()) < 5 / math.sqrt(len(found)) and abs(found.var() - 1) < 5 * math.sqrt(2 / len(found))
    assert stats.kstest(found, "norm").pvalue > 1e-6
    for order, wanted in ((3, 0), (4, 3), (6, 15)):
        error = math.sqrt(stats.norm.moment(2 * order) - wanted**2) / math.sqrt(len(found))
        assert abs((found**order).mean() - wanted) < 5 * error
    tail = int((np.abs(found) > 4).sum())
    assert stats.binomtest(tail, len(found), 2 * stats.norm.sf(4)).pvalue > 1e-6


def test_uniform_numbers_are_uniform() -> None:
    found = SOURCE.uniform(400_000).numpy()
    assert found.min() >= 0 and found.max() < 1
    assert stats.kstest(found, "uniform").pvalue > 1e-6
    bits = (found[:20_000, None] * 2.0 ** np.arange(1, 53)) % 2 >= 1
    assert abs(bits.mean(0) - 0.5).max() < 6 * 0.5 / math.sqrt(20_000), "all 52 bits are random"


def test_normal_numbers_are_independent() -> None:
    """Next to each other, half a call apart (the other numbers of a Box-Muller pair), and in size too."""
    found = numbers()
    for shift in (1, 2, 3, len(found) // 4, len(found) // 2):
        for change in (lambda z: z, np.abs, np.square):
            first, second = change(found[:-shift]), change(found[shift:])
            assert abs(np.corrcoef(first, second)[0, 1]) < 5 / math.sqrt(len(first)), shift
    assert abs(np.corrcoef(numbers(), found)[0, 1]) < 5 / math.sqrt(len(found))


def test_a_number_is_half_of_four_from_two_box_muller_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Computed again with Python's own mathematics from the same bytes."""
    words = np.random.default_rng(0).integers(0, 2**64, 4 * 50, dtype=np.uint64)
    monkeypatch.setattr(cryptographic.os, "urandom", lambda n: words.tobytes()[:n])
    uniform = (words & np.uint64(2**52 - 1)).astype(float).reshape(4, 50) / 2**52
    wanted = [
        sum(
            math.sqrt(-2 * math.log(1 - u)) * (math.cos(2 * math.pi * a) + math.sin(2 * math.pi * a))
            for u, a in ((first, third), (second, fourth))
        )
        / 2
        for first, second, third, fourth in uniform.T
    ]
    assert np.allclose(SOURCE.normal(50, CPU).numpy(), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("byte", [b"\x00", b"\xff"])
def test_the_rarest_bytes_give_finite_numbers(byte: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cryptographic.os, "urandom", lambda n: byte * n)
    assert abs(float(SOURCE.normal(1, CPU))) <= 12.1 and 0 <= float(SOURCE.uniform(1)) < 1


def test_no_numbers_are_no_numbers() -> None:
    assert SOURCE.uniform(0).shape == SOURCE.normal(0, CPU).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (3,), (300, 300)])
def test_the_sum_is_rounded_once(dtype: torch.dtype, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise in double precision is added to the sum, of any layout, before anything is rounded."""
    made: list[Tensor] = []

    def normal(number: int, device: Any) -> Tensor:
        made.append(torch.randn(number, dtype=torch.float64))
        return made[-1].clone()

    source = Cryptographic()
    monkeypatch.setattr(source, "normal", normal)
    for total in (torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype).mT if len(shape) == 2 else None):
        if total is None:
            continue
        made.clear()
        wanted = total.double().clone()
        source.add_normal(total, 0.3)
        assert torch.equal(total, (wanted + 0.3 * torch.cat(made).view(shape)).to(dtype))


# ------------------------------------------------------------------ never the same numbers twice


def test_forks_copies_and_pickles_share_nothing(tmp_path: Path) -> None:
    training = private(secure_mode=True)
    randomness = training[1].randomness
    copies = [randomness, copy.deepcopy(randomness), pickle.loads(pickle.dumps(randomness))]
    assert all(isinstance(r.noise, Cryptographic) and isinstance(r.draws, Cryptographic) for r in copies)

    def act() -> Any:
        return drawn(training, 6), training[1].randomness.noise.normal(50, CPU)

    seen = [*in_children(act, tmp_path), act()]
    assert len({str(draws) for draws, _ in seen}) == 3
    noise = torch.cat([*(n for _, n in seen), *(r.noise.normal(50, CPU) for r in copies)])
    assert len(torch.unique(noise)) == 6 * 50


def test_nothing_is_kept() -> None:
    assert vars(SOURCE) == {}


# ------------------------------------------------------------------ a training


def engine_of(**options: Any) -> Any:
    return dpfix.SafePrivacyEngine(secure_mode=True, **options)


@pytest.mark.parametrize("way", WAYS)
def test_a_training_in_secure_mode_draws_from_the_system_alone(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = DataLoader(points(), batch_size=8, generator=torch.Generator())  # seeds its workers, as in torch
    training = private(secure_mode=True, data_loader=loader, **WAYS[way])
    asked: list[int] = []
    urandom = os.urandom
    monkeypatch.setattr(cryptographic.os, "urandom", lambda n: asked.append(n) or urandom(n))
    before = generator_states()
    monkeypatch.setattr(Stream, "generator", lambda *_: pytest.fail("another generator was asked"))
    moved = torch.stack(epoch(training))
    assert len(moved) == 3 and len(torch.unique(moved.abs())) > moved.numel() - 3  # a few are equal by chance
    assert sum(asked) >= 8 * (3 * 24 + 4 * moved.numel())
    assert_same_generators(before)
    assert "randomness: a cryptographic generator" in training.report.details()
    statement = training.statement(1e-3)
    assert statement.secure_rng and statement.cautions == ()


@pytest.mark.parametrize("way", WAYS)
def test_the_noise_of_a_step_has_the_standard_deviation_that_is_accounted(way: str) -> None:
    """The steps are nearly noise alone; with adaptive clipping the clip norm moves on."""
    training = private(secure_mode=True, **WAYS[way])
    std = 1e4 * training[1].max_grad_norm / 8
    first = epoch(training)[0] / std
    assert abs(float(first.std()) - 1) < 5 / math.sqrt(2 * len(first)) and abs(float(first.mean())) < 5 / math.sqrt(
        len(first)
    )


def test_every_way_to_ask_for_it() -> None:
    target = setting() | {"target_epsilon": 5.0, "target_delta": 1e-3, "epochs": 2}
    del target["noise_multiplier"]
    made = [
        dpfix.make_private_safe(**setting(), secure_mode=True),
        dpfix.make_private_safe(**setting(), privacy_engine=engine_of()),
        dpfix.make_private_safe(**setting(), privacy_engine=engine_of(accountant="rdp"), secure_mode=True),
        engine_of().make_private(**setting()),
        engine_of().make_private_with_epsilon(**target),
        dpfix.make_private_safe_with_epsilon(**target, secure_mode=True),
    ]
    for training in made:
        assert isinstance(training[1].randomness.noise, Cryptographic) and training.statement(1e-3).secure_rng
        assert training.privacy_engine.secure_mode and training.privacy_engine.dataset is not None
    assert made[2].privacy_engine.accountant.mechanism() == "rdp"
    assert not dpfix.make_private_safe(**setting()).privacy_engine.secure_mode


def test_a_loader_that_is_left_alone_keeps_its_generator() -> None:
    """Opacus puts its own generator into the sampler of the script's loader."""
    data = points()
    sampler = RandomSampler(data, generator=torch.Generator().manual_seed(3))
    loader = DataLoader(data, batch_size=8, sampler=sampler)
    training = private(secure_mode=True, data_loader=loader, poisson_sampling=False)
    assert training[2] is loader and sampler.generator is not None


def test_an_engine_with_a_generator_of_opacus_keeps_it() -> None:
    engine = dpfix.SafePrivacyEngine()
    engine.secure_mode, engine.secure_rng = True, torch.Generator()
    assert isinstance(secure_source(engine), Given)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"secure_mode": None}, "secure_mode=None is neither True nor False"),
        ({"secure_mode": 1}, "secure_mode=1 is neither True nor False"),
        ({"secure_mode": True, "seed": 3}, "seed= with secure_mode=True"),
        ({"secure_mode": True, "noise_generator": torch.Generator()}, "noise_generator= with secure_mode=True"),
        (
            {"secure_mode": True, "privacy_engine": dpfix.SafePrivacyEngine()},
            "a privacy_engine that was made without it",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], says: str) -> None:
    given = setting(nn.Sequential(nn.Linear(6, 3), nn.ReLU(inplace=True)), **changes)
    with pytest.raises(dpfix.ArgumentError, match=says):
        dpfix.make_private_safe(**given)
    assert given["module"][1].inplace


def test_a_checkpoint_goes_on_with_new_numbers(tmp_path: Path) -> None:
    training = private(secure_mode=True)
    engine, (model, optimizer, loader) = training.privacy_engine, training
    epoch(training)
    engine.save_checkpoint(path=tmp_path / "c.pt", module=model, optimizer=optimizer, data_loader=loader)
    first = epoch(training)
    with pytest.warns(dpfix.DPFixWarning, match="an earlier one: 3 steps were released since"):
        engine.load_checkpoint(path=tmp_path / "c.pt", module=model, optimizer=optimizer, data_loader=loader)
    assert not torch.equal(first[0], epoch(training)[0])

"""Noise and draws come from generators of the training: nothing in a script repeats them, and they move nothing in it."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import dpfix
from dpfix.sampling import randomness
from dpfix.sampling.randomness import OwnNoise, Randomness, Stream, seeded
from dpfix.sampling.ranks import ALONE
from tests.cases import mlp
from tests.helpers import assert_same_generators, generator_states, points, setting, sgd

ADAPTIVE = {
    "clipping": "adaptive", "target_unclipped_quantile": 0.5, "clipbound_learning_rate": 0.2, "max_clipbound": 1.0,
    "min_clipbound": 1e-3, "unclipped_num_std": 1e9,
}  # fmt: skip
WAYS: dict[str, dict[str, Any]] = {
    "in place": {"grad_sample_mode": "bookkeeping"},
    "Opacus's flat": {"grad_sample_mode": "hooks"},
    "per layer": {"clipping": "per_layer", "max_grad_norm": [1e-3] * 4},
    "adaptive": ADAPTIVE,
}


@pytest.fixture(autouse=True)
def reproducible_randomness() -> None:
    """Here the operating system seeds, as it does for a user."""


class Augmented(Dataset[Any]):
    """Seeds torch in every item."""

    def __init__(self) -> None:
        self.points = points()

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> Any:
        torch.manual_seed(42)
        return self.points[index]


def private(**changes: Any) -> dpfix.PrivateTraining:
    """A training whose steps are nearly noise alone."""
    torch.manual_seed(0)
    model = mlp()
    given = {"optimizer": sgd(model), "noise_multiplier": 1e4, "max_grad_norm": 1e-3, "cache": False}
    return dpfix.make_private_safe(**setting(model, **(given | changes)))


def step(training: Any, batch: Any) -> Tensor:
    """What the parameters move in one step."""
    model, optimizer, _ = training
    before = nn.utils.parameters_to_vector(model.parameters()).detach()
    optimizer.zero_grad()
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()
    return nn.utils.parameters_to_vector(model.parameters()).detach() - before


def epoch(training: Any) -> list[Tensor]:
    return [step(training, batch) for batch in training[2]]


def drawn(training: Any, passes: int = 4) -> list[tuple[int, ...]]:
    return [tuple(batch) for _ in range(passes) for batch in training[2].batch_sampler]


def alike(*noises: Tensor) -> float:
    """The largest correlation of two of them."""
    z = torch.stack(noises)
    z = z / z.norm(dim=1, keepdim=True)
    return float((z @ z.T).fill_diagonal_(0).abs().max())


# ------------------------------------------------------------------ what a script does to its own generators


@pytest.mark.parametrize("way", WAYS)
def test_seeding_torch_per_epoch_repeats_no_noise(way: str) -> None:
    training = private(**WAYS[way])
    moved = []
    for _ in range(3):
        torch.manual_seed(0)
        moved += epoch(training)
    assert len(moved) == 9 and alike(*moved) < 0.6


def test_seeding_torch_repeats_no_draws() -> None:
    training = private(data_loader=DataLoader(points(200), batch_size=20))
    found = []
    for _ in range(3):
        torch.manual_seed(0)
        found += drawn(training, 1)
    assert len(set(found)) == 30


@pytest.mark.filterwarnings("ignore:3 draw.s. of the data_loader were skipped")  # those that are only looked at
def test_seeding_torch_in_the_dataset_or_in_an_evaluation_repeats_nothing() -> None:
    training = private(data_loader=DataLoader(Augmented(), batch_size=8))
    moved, found = [], []
    for _ in range(3):
        moved += epoch(training)
        torch.manual_seed(1)
        training[0](torch.randn(2, 6))
        found.append(drawn(training, 1))
    assert alike(*moved) < 0.6
    assert found[0] != found[1] != found[2] != found[0]


def test_a_seeded_generator_of_the_loader_decides_no_draws() -> None:
    def made() -> Any:
        loader = DataLoader(points(), batch_size=8, generator=torch.Generator().manual_seed(2))
        return private(data_loader=loader)

    assert drawn(made()) != drawn(made())


@pytest.mark.parametrize("way", WAYS)
def test_noise_and_draws_move_none_of_the_scripts_generators(way: str) -> None:
    loader = DataLoader(points(), batch_size=8, generator=torch.Generator())
    training = private(data_loader=loader, **WAYS[way])
    before, of_the_loader = generator_states(), loader.generator.get_state()
    epoch(training)
    assert_same_generators(before)
    after = loader.generator.get_state()
    loader.generator.set_state(of_the_loader)
    torch.empty((), dtype=torch.int64).random_(generator=loader.generator)  # the workers' seed, as torch draws it
    assert torch.equal(loader.generator.get_state(), after)


# ------------------------------------------------------------------ never the same stream twice


def test_two_trainings_have_other_noise_and_draws() -> None:
    first, second = private(), private()
    assert alike(epoch(first)[0], epoch(second)[0]) < 0.6
    assert drawn(first) != drawn(second)


def in_children(act: Callable[[], Any], folder: Path, number: int = 2) -> Iterator[Any]:
    """What forked processes get that do the same at the same moment."""
    for child in range(number):
        process = os.fork()
        if not process:
            torch.save(act(), folder / f"{child}.pt")
            os._exit(0)
        assert os.waitpid(process, 0)[1] == 0
        yield torch.load(folder / f"{child}.pt")


@pytest.mark.parametrize("changes", [{}, {"seed": 3}], ids=["from the system", "seed"])
def test_forked_processes_share_no_noise_and_no_draws(changes: dict[str, Any], tmp_path: Path) -> None:
    """Also in the middle of a pass."""
    training = private(**changes)
    passing = iter(training[2].batch_sampler)
    next(passing)

    def act() -> Any:
        return [tuple(b) for b in passing], drawn(training, 6), noise_of(training)

    children = list(in_children(act, tmp_path))
    seen = [*children, act()]
    rests, draws, noises = zip(*seen, strict=True)
    assert len({str(rest) for rest in rests}) == 3 and len({str(d) for d in draws}) == 3
    assert alike(*noises) < 0.6


def noise_of(training: Any) -> Tensor:
    """The next noise, without a step."""
    return torch.normal(0.0, 1.0, (200,), generator=training[1].randomness.noise.generator())


@pytest.mark.parametrize("changes", [{}, {"seed": 3}], ids=["from the system", "seed"])
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))], ids=["deepcopy", "pickle"]
)
def test_a_copy_is_another_stream(duplicate: Callable[[Any], Any], changes: dict[str, Any]) -> None:
    training = private(**changes)
    epoch(training)
    copied = duplicate(training[1].randomness)
    assert copied.seed == training[1].randomness.seed, "what was released before could still be computed again"
    noises = [noise_of(training), torch.normal(0.0, 1.0, (200,), generator=copied.noise.generator())]
    assert alike(*noises) < 0.6
    draws = [torch.rand(200, generator=r.draws.generator()) - 0.5 for r in (training[1].randomness, copied)]
    assert alike(*draws) < 0.6


def test_a_copied_loader_draws_other_batches() -> None:
    """An optimizer of Opacus cannot be copied."""
    training = private()
    copied = copy.deepcopy(training[2])
    assert drawn(training) != [tuple(b) for _ in range(4) for b in copied.batch_sampler]


def test_all_bits_of_the_seed_count() -> None:
    """Torch's CPU generator takes 32 bits of a seed: one in 2**32 could be tried out."""
    assert torch.equal(*(torch.rand(3, generator=torch.Generator().manual_seed(s)) for s in (5, 5 + 2**32)))
    cpu = torch.device("cpu")
    first, second = (torch.rand(200, generator=seeded(cpu, (s,))) - 0.5 for s in (5, 5 + 2**32))
    assert alike(first, second) < 0.6
    words = np.random.SeedSequence(5).generate_state(624, np.uint32)
    twister = np.random.MT19937()
    twister.state = {"bit_generator": "MT19937", "state": {"key": words, "pos": 624}}
    wanted = twister.random_raw(4) & (2**24 - 1)  # torch makes a float of the last 24 bits of a number
    assert torch.equal(torch.rand(4, generator=seeded(cpu, (5,))) * 2**24, torch.as_tensor(wanted.astype(np.float32)))


def test_the_operating_system_is_asked_for_128_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(randomness.os, "urandom", lambda n: asked.append(n) or bytes(n))
    private()
    assert asked == [16, 16]


def test_another_torch_is_refused_before_anything_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    as_if = type("RandomState", (), {"get_state": lambda *_, **__: {"state": {"key": np.zeros(624)}}})
    monkeypatch.setattr(np.random, "RandomState", lambda _: as_if())
    model = nn.Sequential(nn.Linear(6, 3), nn.ReLU(inplace=True))
    with pytest.raises(dpfix.DPFixError, match="in a form that dpfix does not know"):
        dpfix.make_private_safe(**setting(model))
    assert model[1].inplace


def test_every_device_has_its_own_generator_of_one_stream() -> None:
    """Whatever Opacus passes on as the generator, and whatever says where the noise is to be."""
    stream = Stream((1,))
    wanted = [torch.normal(0.0, 1.0, (3,), generator=Stream((1,)).generator())]
    with OwnNoise(stream):
        found = [torch.normal(mean=0, std=1.0, size=(3,), generator=None)]
        given = torch.normal(0.0, 1.0, (3,), device="cpu", generator=torch.Generator().manual_seed(4))
        more = [torch.empty(3).normal_(), torch.randn(3), torch.normal(torch.zeros(3), 1.0)]
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(given, torch.normal(0.0, 1.0, (3,), generator=torch.Generator().manual_seed(4)))
    again = Stream((1,))
    torch.normal(0.0, 1.0, (3,), generator=again.generator())
    assert all(torch.equal(m, torch.empty(3).normal_(generator=again.generator())) for m in more)


def test_the_generators_of_several_devices_share_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is made once. There are stand-ins on the CPU, for machines with one device."""
    made: list[torch.device] = []

    def on_the_cpu(device: torch.device, entropy: tuple[int, ...]) -> torch.Generator:
        made.append(device)
        return seeded(torch.device("cpu"), entropy)

    monkeypatch.setattr(randomness, "seeded", on_the_cpu)
    devices = [torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)]
    for stream in (Stream(), Stream((5,))):
        noises = [torch.normal(0.0, 1.0, (200,), generator=stream.generator(d)) for d in devices * 2]
        assert alike(*noises) < 0.6
    assert made == devices * 2


# ------------------------------------------------------------------ a seed


@pytest.mark.parametrize("way", WAYS)
def test_the_same_seed_gives_equal_runs(way: str) -> None:
    runs = []
    for seed in (5, 5, 6):
        training = private(seed=seed, **WAYS[way])
        torch.manual_seed(len(runs))
        runs.append((drawn(training), torch.stack(epoch(training))))
    assert runs[0][0] == runs[1][0] != runs[2][0]
    assert torch.equal(runs[0][1], runs[1][1]) and alike(runs[0][1][0], runs[2][1][0]) < 0.6
    assert alike(*runs[0][1]) < 0.6


def test_a_seed_reaches_the_other_calls() -> None:
    def budget(seed: int) -> Any:
        given = setting() | {"target_epsilon": 5.0, "target_delta": 1e-3, "epochs": 2, "seed": seed}
        del given["noise_multiplier"]
        return given

    made = [
        dpfix.make_private_safe_with_epsilon(**budget(4)),
        dpfix.SafePrivacyEngine().make_private(**setting(seed=4)),
    ]
    made.append(dpfix.SafePrivacyEngine().make_private_with_epsilon(**budget(4)))
    assert drawn(made[0]) == drawn(made[1]) == drawn(made[2])
    with pytest.raises(dpfix.ArgumentError, match="seed=-1 is not a whole number"):
        dpfix.make_private_safe_with_epsilon(**budget(-1))


@pytest.mark.parametrize("given", ["seed", "noise_generator"])
def test_noise_that_can_be_computed_again_is_told(given: str) -> None:
    value = 1234567 if given == "seed" else torch.Generator().manual_seed(1234567)
    training, plain = private(**{given: value}), private()
    (caution,) = training.statement(1e-3).cautions
    assert "protects nobody from whoever knows that seed" in caution
    assert f"randomness: from {given}=, so that the noise can be computed again" in training.report.details()
    assert "1234567" not in training.report.details() + training.report.to_json() + str(training.statement(1e-3))
    assert plain.statement(1e-3).cautions == ()
    assert "randomness: the training's own generators, seeded by the operating system" in plain.report.details()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seed": 1.0}, r"seed=1.0 is not a whole number"),
        ({"seed": True}, r"seed=True is not a whole number"),
        ({"seed": "7"}, r"seed='7' is not a whole number"),
        ({"seed": -1}, r"seed=-1 is not a whole number from 0 to 2\*\*64 - 1"),
        ({"seed": 2**64}, r"seed=18446744073709551616 is not"),
        ({"seed": torch.tensor([3, 4])}, r"seed=tensor\(\[3, 4\]\) is not a whole number"),
        ({"noise_generator": 3}, r"noise_generator is int, not a torch.Generator"),
        ({"noise_generator": np.random.default_rng(0)}, r"noise_generator is Generator, not a torch.Generator"),
    ],
)
def test_what_is_no_seed_is_refused(changes: dict[str, Any], says: str) -> None:
    given = setting(**changes)
    before = generator_states()
    with pytest.raises(dpfix.ArgumentError, match=says):
        dpfix.make_private_safe(**given)
    assert_same_generators(before)


@pytest.mark.parametrize("given", ["seed", "noise_generator"])
def test_a_seed_and_cryptographic_noise_are_refused(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = dpfix.SafePrivacyEngine()
    engine.secure_mode, engine.secure_rng = True, torch.Generator()
    value = 0 if given == "seed" else torch.Generator()
    with pytest.raises(dpfix.ArgumentError, match=f"{given}= with secure_mode=True"):
        engine.make_private(**setting(**{given: value}))


@pytest.mark.parametrize("seed", [0, 2**64 - 1, np.int64(3), torch.tensor(3)])
def test_seeds_that_are_taken(seed: Any) -> None:
    assert len(epoch(private(seed=seed))) == 3


@pytest.mark.filterwarnings("ignore:3 draw.s. of the data_loader were skipped")  # those that are only looked at
def test_opacus_cryptographic_generator_draws_and_adds_noise_as_before() -> None:
    """Stood in for by one of torch's: the package it comes from has no build for this torch."""
    engine = dpfix.SafePrivacyEngine()
    engine.secure_mode, engine.secure_rng = True, torch.Generator().manual_seed(3)
    training = private(privacy_engine=engine)
    assert training[1].generator is engine.secure_rng and training[2].generator is engine.secure_rng
    before = engine.secure_rng.get_state()
    drawn(training, 1)
    assert not torch.equal(before, engine.secure_rng.get_state())
    before = engine.secure_rng.get_state()
    epoch(training)
    assert not torch.equal(before, engine.secure_rng.get_state())
    assert "randomness: a cryptographic generator" in training.report.details()
    assert training.statement(1e-3).secure_rng and training.statement(1e-3).cautions == ()


def test_noise_and_draws_of_one_seed_are_independent() -> None:
    both = Randomness.of(5, None, ALONE)
    noise, draws = (torch.rand(200, generator=s.generator()) - 0.5 for s in (both.noise, both.draws))
    assert alike(noise, draws) < 0.6

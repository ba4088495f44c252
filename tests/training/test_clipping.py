"""Clipping schemes other than flat: empty draws, split batches, and what the adaptive clip norm is made of."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.utils.data import DataLoader

import dpfix
from dpfix.engines import ENGINES
from tests.helpers import points, setting, sgd, train

ADAPTIVE: dict[str, Any] = {
    "clipping": "adaptive", "target_unclipped_quantile": 0.5, "clipbound_learning_rate": 0.2, "max_clipbound": 10.0,
    "min_clipbound": 0.01, "unclipped_num_std": 1.5,
}  # fmt: skip
SCHEMES: dict[str, dict[str, Any]] = {
    "flat": {"max_grad_norm": 0.5},
    "per_layer": {"clipping": "per_layer", "max_grad_norm": [0.3, 0.4]},
    "per_group": {"clipping": "per_group", "max_grad_norm": {"0.*": 0.3, "*": 0.4}},
    "automatic": {"clipping": "automatic", "max_grad_norm": 0.5},
    "adaptive": ADAPTIVE | {"max_grad_norm": 0.5},
}
COUNTED: dict[str, Any] = ADAPTIVE | {
    "unclipped_num_std": 1e-9,
    "noise_multiplier": 0.0,
    "max_clipbound": 1e9,
    "min_clipbound": 1e-9,
}
"""The noise on the count is next to nothing."""
HIGH, LOW = 1e6, 1e-6
"""Clip norms that leave every sample unclipped, and none."""


def start(engine: Any = "auto", *, draws: list[list[int]], **options: Any) -> tuple[nn.Module, dpfix.PrivateTraining]:
    model = nn.Sequential(nn.Linear(6, 300, bias=False), nn.Linear(300, 3, bias=False))
    given = setting(
        model, optimizer=sgd(model), data_loader=DataLoader(points(24), batch_size=8), grad_sample_mode=engine
    )
    training = dpfix.make_private_safe(**given | options)
    vars(training[2])["batch_sampler"] = draws
    return model, training


def one_by_one(model: nn.Module, training: dpfix.PrivateTraining, cleared: nn.Module | None = None) -> list[Any]:
    """For every draw, how the parameters moved and the clip norm after it."""
    seen = []
    for x, y in training[2]:
        before = nn.utils.parameters_to_vector(model.parameters()).detach()
        (cleared if cleared is not None else training[1]).zero_grad()
        nn.functional.cross_entropy(training[0](x), y).backward()
        training[1].step()
        moved = nn.utils.parameters_to_vector(model.parameters()).detach() - before
        seen.append((moved, training[1].max_grad_norm))
    return seen


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_empty_draw_is_noise_alone(scheme: str, engine: str) -> None:
    model, training = start(engine, draws=[[], [0, 1, 2], [], []], noise_multiplier=2.0, **SCHEMES[scheme])
    seen = one_by_one(model, training)
    assert training.privacy_engine.accountant.history == [(2.0, 8 / 24, 4)]
    sigma = (2.0**-2 - (2 * 1.5) ** -2) ** -0.5 if scheme == "adaptive" else 2.0
    for number in (0, 2, 3):
        moved, clip = seen[number][0], 0.5 if number == 0 else seen[number - 1][1]
        assert float(moved.std()) == pytest.approx(sigma * clip / 8, rel=5 / (2 * len(moved)) ** 0.5)
        assert abs(float(moved.mean())) < 5 * sigma * clip / 8 / len(moved) ** 0.5


@pytest.mark.parametrize("scheme", SCHEMES)
def test_training_with_many_empty_draws(scheme: str) -> None:
    given = setting(nn.Sequential(nn.Linear(6, 4, bias=False), nn.Linear(4, 3, bias=False)), **SCHEMES[scheme])
    given["data_loader"] = DataLoader(points(24), batch_size=1)
    training = dpfix.make_private_safe(**given)
    assert train(training, 40) == 40
    assert all(bool(torch.isfinite(p).all()) for p in training[0].parameters())
    assert training.statement(1e-3).steps == 40
    assert 0.01 <= training[1].max_grad_norm <= 10.0


def test_an_empty_draw_moves_the_adaptive_clip_norm_by_noise_alone() -> None:
    model, training = start(draws=[[]] * 50, **ADAPTIVE)
    norms = [training[1].max_grad_norm, *(norm for _, norm in one_by_one(model, training))]
    moves = [math.log(b / a) / 0.2 for a, b in itertools.pairwise(norms)]
    assert len(set(moves)) == 50
    assert torch.tensor(moves).std().item() == pytest.approx(1.5 / 8, rel=0.5)
    assert abs(sum(moves) / 50) < 5 * 1.5 / 8 / 50**0.5


@pytest.mark.parametrize(("clip", "unclipped"), [(HIGH, True), (LOW, False)])
def test_the_adaptive_clip_norm_divides_by_a_public_number(clip: float, unclipped: bool) -> None:
    """Not by the number of samples drawn, which has no noise: one person more or less would show in the clip norm."""
    for drawn in (0, 1, 4, 12):
        model, training = start(draws=[list(range(drawn))], **COUNTED | {"max_grad_norm": clip})
        ((_, norm),) = one_by_one(model, training)
        surplus = (drawn if unclipped else -drawn) / 2 / 8
        assert norm == pytest.approx(clip * math.exp(-0.2 * surplus), rel=1e-5)


def test_a_split_batch_counts_as_one() -> None:
    """A BatchMemoryManager's loop clears gradients between the parts of a logical batch."""
    norms = []
    for physical in (4, 24):
        _, training = start(draws=[list(range(11))], **COUNTED | {"max_grad_norm": HIGH})
        with BatchMemoryManager(
            data_loader=training[2], max_physical_batch_size=physical, optimizer=training[1]
        ) as split:
            for x, y in split:
                training[1].zero_grad()
                nn.functional.cross_entropy(training[0](x), y).backward()
                training[1].step()
        norms.append(training[1].max_grad_norm)
    assert norms == [pytest.approx(HIGH * math.exp(-0.2 * 11 / 2 / 8), rel=1e-5)] * 2


def test_clearing_the_model_clears_the_count() -> None:
    draws = [[0, 1, 2]] * 3
    model, training = start(draws=draws, **COUNTED | {"max_grad_norm": HIGH})
    norms = [norm for _, norm in one_by_one(model, training, cleared=training[0])]
    assert norms == [pytest.approx(HIGH * math.exp(-0.2 * n * 3 / 2 / 8), rel=1e-5) for n in (1, 2, 3)]


def test_the_adaptive_clip_norm_stands_in_the_statement() -> None:
    model, training = start(draws=[[0, 1], []], **ADAPTIVE)
    one_by_one(model, training)
    said = json.loads(training.statement(1e-3).to_json())
    assert said["max_grad_norm"] == training[1].max_grad_norm != 1.0


@pytest.mark.parametrize("changes", [{"noise_multiplier": 4.0}, {"unclipped_num_std": 0.1}])
def test_more_noise_than_the_count_leaves_is_refused(changes: dict[str, float]) -> None:
    """A scheduler may raise the noise while training."""
    training = dpfix.make_private_safe(**setting(**ADAPTIVE, max_grad_norm=0.5))
    for name, value in changes.items():
        setattr(training[1], name, value)
    before = [p.clone() for p in training[0].parameters()]
    with pytest.raises(dpfix.ArgumentError, match=r"noise_multiplier=\d with unclipped_num_std="):
        for x, y in training[2]:
            training[1].zero_grad()
            nn.functional.cross_entropy(training[0](x), y).backward()
            training[1].step()
    assert all(map(torch.equal, before, training[0].parameters()))

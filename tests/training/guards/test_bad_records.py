"""One record whose gradient is not finite neither stops a training nor steers it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dpfix
from dpfix.engines import ENGINES
from tests.helpers import sgd
from tests.training.steps import every_engine, values
from tests.training.test_clipping import COUNTED, SCHEMES

BAD = 5
SAMPLES = 12
NAN, INF = float("nan"), float("inf")
WITH, WITHOUT = [0, 1, 2, 3, BAD], [0, 1, 2, 3]
CLIP_NORMS: dict[str, Any] = {"per_layer": [0.1] * 6, "per_group": {"*.weight": 0.1, "*": 0.3}}
"""Of a model with six parameters; 0.3 for others."""

Data = tuple[Tensor, Tensor]


def vectors() -> Data:
    draw = torch.Generator().manual_seed(3)
    return torch.randn(SAMPLES, 6, generator=draw), torch.randint(0, 3, (SAMPLES,), generator=draw)


def images() -> Data:
    draw = torch.Generator().manual_seed(3)
    return torch.randn(SAMPLES, 4, 8, 8, generator=draw), torch.randint(0, 3, (SAMPLES,), generator=draw)


def sequences() -> Data:
    draw = torch.Generator().manual_seed(3)
    return torch.randn(SAMPLES, 5, 6, generator=draw), torch.randint(0, 3, (SAMPLES,), generator=draw)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, groups=2), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(288, 3)
    )


class Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x + self.attention(x, x, x)[0])[:, -1])


class Tied(nn.Module):
    """A table that is looked up and multiplies, and a layer that is used twice; what is bad comes in beside the ids."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.twice, self.scale = nn.Embedding(3, 6), nn.Linear(6, 6), nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        ids = torch.nan_to_num(x, 0, 0, 0).abs().round().clamp(max=2).long()
        inside = (self.table(ids) * x.unsqueeze(-1)).sum(1) * self.scale
        return nn.functional.linear(self.twice(torch.tanh(self.twice(inside))), self.table.weight)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Data]]] = {
    "mlp": (mlp, vectors),
    "cnn": (cnn, images),
    "sequence": (Sequence, sequences),
    "attention": (Attention, sequences),
    "tied": (Tied, vectors),
}


def start(
    engine: str, model: str = "mlp", value: float = NAN, *, draws: list[list[int]] | None = None, **options: Any
) -> tuple[nn.Module, dpfix.PrivateTraining]:
    torch.manual_seed(0)
    make, data = MODELS[model]
    module, (x, y) = make(), data()
    x[BAD].view(-1)[0] = value
    given: dict[str, Any] = {
        "module": module, "optimizer": sgd(module), "data_loader": DataLoader(TensorDataset(x, y), batch_size=4),
        "criterion": nn.CrossEntropyLoss(), "noise_multiplier": 0.0, "max_grad_norm": 0.3, "grad_sample_mode": engine,
    }  # fmt: skip
    training = dpfix.make_private_safe(**given | options)
    if draws is not None:
        vars(training[2])["batch_sampler"] = draws
    return module, training


def moved(module: nn.Module, training: dpfix.PrivateTraining) -> Tensor:
    before = values(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dpfix.DPFixWarning)
        for x, y in training[2]:
            training[1].zero_grad()
            nn.functional.cross_entropy(training[0](x), y).backward()
            training[1].step()
    return values(module) - before


@every_engine
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("model", MODELS)
def test_a_bad_record_moves_the_release_by_nothing(model: str, value: float, engine: str) -> None:
    try:
        with_it = moved(*start(engine, model, value, draws=[WITH]))
    except dpfix.ModelError:
        pytest.skip("not an engine for this model")
    without = moved(*start(engine, model, value, draws=[WITHOUT]))
    assert float(without.norm()) > 0.01
    torch.testing.assert_close(with_it, without, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("engine", [*ENGINES, "ew"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_whatever_the_clipping(scheme: str, engine: str) -> None:
    options: dict[str, Any] = SCHEMES[scheme] | {"max_grad_norm": CLIP_NORMS.get(scheme, 0.3)}
    if scheme == "adaptive":
        options |= COUNTED
    found = []
    for draw in (WITH, WITHOUT):
        module, training = start(engine, draws=[draw, draw], **options)
        found.append((moved(module, training), training[1].max_grad_norm))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-6, rtol=1e-5)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-6), (
        "a clip norm that adapts must not feel the record either"
    )


@every_engine
@pytest.mark.parametrize("physical", [1, 2])
def test_in_a_batch_that_is_split(physical: int, engine: str) -> None:
    """The record may be alone in its part."""
    module, training = start(engine, draws=[[BAD, 0, 1, 2, 3]])
    before = values(module)
    with (
        warnings.catch_warnings(action="ignore"),
        BatchMemoryManager(data_loader=training[2], max_physical_batch_size=physical, optimizer=training[1]) as split,
    ):
        for x, y in split:
            training[1].zero_grad()
            nn.functional.cross_entropy(training[0](x), y).backward()
            training[1].step()
    torch.testing.assert_close(values(module) - before, moved(*start(engine, draws=[WITHOUT])), atol=1e-6, rtol=1e-5)


@every_engine
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_draw_of_the_bad_record_alone_is_noise_alone(scheme: str, engine: str) -> None:
    options: dict[str, Any] = SCHEMES[scheme] | {"max_grad_norm": CLIP_NORMS.get(scheme, 0.3)}
    module, training = start(engine, draws=[[BAD]], **dict[str, Any](options, noise_multiplier=1.0))
    assert bool(torch.isfinite(moved(module, training)).all())
    assert float(moved(module, training).norm()) > 0
    assert training.statement(1e-3).steps == 2


@every_engine
def test_several_backward_passes_before_a_step(engine: str) -> None:
    module, training = start(engine, poisson_sampling=False)
    x, y = training[2].dataset.tensors
    found = []
    for batches in ([WITH, WITHOUT], [WITHOUT, WITHOUT]):
        before = values(module)
        training[1].zero_grad()
        for rows in batches:
            nn.functional.cross_entropy(training[0](x[rows]), y[rows]).backward()
        with warnings.catch_warnings(action="ignore"):
            training[1].step()
        found.append(values(module) - before)
        with torch.no_grad():
            for p, part in zip(
                module.parameters(), before.split([p.numel() for p in module.parameters()]), strict=True
            ):
                p.copy_(part.view_as(p))
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-5)


@every_engine
def test_it_is_said_once_without_a_word_about_the_record(engine: str) -> None:
    _, training = start(engine, draws=[WITH, WITH, WITHOUT, WITH])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for x, y in training[2]:
            training[1].zero_grad()
            nn.functional.cross_entropy(training[0](x), y).backward()
            training[1].step()
    said = [str(w.message) for w in caught if issubclass(w.category, dpfix.DPFixWarning)]
    assert len(said) == 1 and "not finite" in said[0] and "contributes nothing" in said[0]
    assert not any(character.isdigit() for character in said[0])
    assert training[1].accumulated_iterations == 1


@every_engine
def test_a_batch_of_bad_records_alone_is_refused(engine: str) -> None:
    """The loss or the model is at fault there; every step would be noise."""
    module, training = start(engine, draws=[[0, 1, 2]])
    before = values(module)
    (x, y) = next(iter(training[2]))
    (nn.functional.cross_entropy(training[0](x), y) * NAN).backward()
    with pytest.raises(dpfix.NonFiniteGradientError, match="every sample"):
        training[1].step()
    assert torch.equal(values(module), before)


@every_engine
@pytest.mark.parametrize("draw", [[0], [0, 1]])
def test_parameters_that_are_not_finite_are_refused(draw: list[int], engine: str) -> None:
    module, training = start(engine, draws=[draw])
    with torch.no_grad():
        next(module.parameters())[0, 0] = NAN
    (x, y) = next(iter(training[2]))
    nn.functional.cross_entropy(training[0](x), y).backward()
    with pytest.raises(dpfix.NonFiniteGradientError, match=r"parameter `0\.weight` of Sequential is not finite"):
        training[1].step()


def test_the_loss_is_still_proven() -> None:
    """A bad record in the first steps leaves the proof of a loss that nobody has told for the steps that follow."""
    training = start("auto", draws=[WITH] * 2 + [[0, 1, 2]], criterion=None)[1]
    criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 0.1]))
    with pytest.raises(dpfix.CoupledLossError), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the gradient of a sample is not finite")
        for x, y in training[2]:
            training[1].zero_grad()
            criterion(training[0](x), y).backward()
            training[1].step()

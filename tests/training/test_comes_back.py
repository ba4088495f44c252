"""A part of the model that the check did not use is trained once the loop uses it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

import dpfix
from dpfix.choose import select
from tests.helpers import points, sgd
from tests.reference import clipped_sum, gradients_one_by_one, relative_error

CLIP = 0.5
EXPECTED = 6


class Tasks(nn.Module):
    """Two heads, one of which is chosen by an argument or a state of the model; a third is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.never = nn.Linear(6, 8), nn.Linear(8, 3)
        self.heads = nn.ModuleDict({"a": nn.Linear(8, 3), "b": nn.Linear(8, 3)})
        self.task = "a"

    def forward(self, x: Tensor, task: str | None = None) -> Tensor:
        return self.heads[task or self.task](torch.tanh(self.trunk(x)))


class Both(Tasks):
    def forward(self, x: Tensor, task: str | None = None) -> Any:
        h = torch.tanh(self.trunk(x))
        return self.heads["a"](h), self.heads["b"](h)


def by_argument(model: nn.Module, batch: Any, task: str) -> Tensor:
    return F.cross_entropy(model(batch[0], task), batch[1])


def by_state(model: Any, batch: Any, task: str) -> Tensor:
    model.task = task
    return F.cross_entropy(model(batch[0]), batch[1])


def by_output(model: nn.Module, batch: Any, task: str) -> Tensor:
    return F.cross_entropy(model(batch[0])["ab".index(task)], batch[1])


def plain(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def private(model: nn.Module, **changes: Any) -> dpfix.PrivateTraining:
    given = {"noise_multiplier": 0.0, "max_grad_norm": CLIP, "wrap_model": False, "cache": False}
    loader = DataLoader(points(), EXPECTED, shuffle=True)
    return dpfix.make_private_safe(module=model, optimizer=sgd(model, 0.1), data_loader=loader, **(given | changes))


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize(("build", "loss"), [(Tasks, by_argument), (Tasks, by_state), (Both, by_output)])
def test_another_head_is_trained_once_gradient_reaches_it(
    build: type[Tasks], loss: Callable[[nn.Module, Any, str], Tensor], told: bool
) -> None:
    if not told and loss is by_output:
        pytest.skip("a loss over one of several outputs has to be told")
    torch.manual_seed(0)
    model, fresh = build(), build()
    step = (lambda m, batch: loss(m, batch, "a")) if loss is not by_state else plain
    given = {"training_step": step} if told else {"training_step": None, "criterion": nn.CrossEntropyLoss()}
    training = private(model, **given)
    assert "heads.b.weight" in training.plan.frozen_parameters
    _, optimizer, loader = training
    left_out, right = 0, 0
    for _ in range(3):
        for number, batch in enumerate(loader):
            task = "ab"[number % 2]
            fresh.load_state_dict(model.state_dict())
            optimizer.zero_grad()
            loss(model, batch, task).backward()
            before = [p.detach().clone() for p in model.parameters()]
            try:
                optimizer.step()
            except dpfix.DPFixWarning as warning:
                assert "trained from the next step on" in str(warning) or "ordinary one from the next step" in str(
                    warning
                )
                assert all(map(torch.equal, before, model.parameters()))
                left_out += 1
                continue
            singles = [(batch[0][i : i + 1], batch[1][i : i + 1]) for i in range(len(batch[0]))]
            wanted = clipped_sum(gradients_one_by_one(fresh, lambda m, b, task=task: loss(m, b, task), singles), CLIP)
            wanted = {n: g for n, g in wanted.items() if bool(g.any())}
            trained = dict(model.named_parameters())
            assert relative_error({n: trained[n].grad * EXPECTED for n in wanted}, wanted) < 1e-4  # type: ignore[operator]
            right += task == "b" and bool(wanted)
    assert left_out <= 2 and right >= 2
    assert set(training.plan.frozen_parameters) == {"never.weight", "never.bias"}
    assert len(training.privacy_engine.accountant.history) == 1
    assert sum(entry[-1] for entry in training.privacy_engine.accountant.history) == 12


def test_what_comes_back_gets_noise() -> None:
    torch.manual_seed(0)
    model = Tasks()
    training = private(model, training_step=lambda m, batch: by_argument(m, batch, "a"), noise_multiplier=100.0)
    _, optimizer, loader = training
    with pytest.warns(dpfix.DPFixWarning, match="trained from the next step on"):
        for number, batch in enumerate(loader):
            optimizer.zero_grad()
            by_argument(model, batch, "b").backward()
            optimizer.step()
            head = model.heads["b"].weight.grad
            assert (head is None) == (number == 0)
            if head is not None:
                assert 0.3 < float(head.std()) * EXPECTED / (100.0 * CLIP) < 3


class Tokens(nn.Module):
    """A class token that is used beside a mask token, which some calls use."""

    def __init__(self) -> None:
        super().__init__()
        self.cls, self.mask = nn.Parameter(torch.ones(6)), nn.Parameter(torch.zeros(6))
        self.masks = False

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cls + self.mask if self.masks else x + self.cls


class BesideLayers(nn.Sequential):
    """A parameter beside layers that are trained; some calls use it."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        self.mask = nn.Parameter(torch.zeros(6))
        self.masks = False

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (self.mask if self.masks else 0)


class InADict(nn.Module):
    """A parameter in a container that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.masks = nn.ParameterDict({"mask": torch.zeros(6)}), False
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + (self.tokens["mask"] if self.masks else 0)


class OfAnother(nn.Module):
    """A weight that is used outside of its layer, which is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.masks = nn.Linear(6, 6), nn.Linear(6, 6), False

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return F.linear(h, self.second.weight) if self.masks else h


class AtTheRoot(nn.Module):
    """A parameter of the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.mask, self.masks = nn.Linear(6, 3), nn.Parameter(torch.zeros(6)), False

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x + self.mask if self.masks else x)


PLACES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "beside a parameter": (lambda: nn.Sequential(Tokens(), nn.Linear(6, 3)), "0.mask"),
    "beside layers": (lambda: nn.Sequential(BesideLayers(), nn.Linear(6, 3)), "0.mask"),
    "in a container": (lambda: nn.Sequential(InADict(), nn.Linear(6, 3)), "0.tokens.mask"),
    "used elsewhere": (lambda: nn.Sequential(OfAnother(), nn.Linear(6, 3)), "0.second.weight"),
    "at the root": (AtTheRoot, "mask"),
}


def masking(model: nn.Module, masks: bool) -> None:
    for module in model.modules():
        if hasattr(module, "masks"):
            module.masks = masks  # type: ignore[assignment]


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("place", PLACES)
def test_gradient_that_comes_for_others_brings_no_parameter_back(place: str, told: bool) -> None:
    build, name = PLACES[place]
    training = private(model := build(), training_step=plain if told else None)
    _, optimizer, loader = training
    for batch in loader:
        optimizer.zero_grad()
        plain(model, batch).backward()
        optimizer.step()
    assert name in training.plan.frozen_parameters
    assert model.get_parameter(name).grad is None


@pytest.mark.parametrize("engine", ["auto", "vmap", "microbatch"])
@pytest.mark.parametrize("place", PLACES)
def test_gradient_is_noticed_wherever_the_parameter_is(place: str, engine: str) -> None:
    build, name = PLACES[place]
    torch.manual_seed(0)
    model, fresh = build(), build()
    training = private(model, training_step=None, grad_sample_mode=engine)
    assert name in training.plan.frozen_parameters
    _, optimizer, loader = training
    masking(model, True)
    masking(fresh, True)
    left_out = right = 0
    for batch in loader:
        fresh.load_state_dict(model.state_dict())
        optimizer.zero_grad()
        plain(model, batch).backward()
        try:
            optimizer.step()
        except dpfix.DPFixWarning as warning:
            assert name in str(warning) and "trained from the next step on" in str(warning)
            left_out += 1
            continue
        singles = [(batch[0][i : i + 1], batch[1][i : i + 1]) for i in range(len(batch[0]))]
        wanted = clipped_sum(gradients_one_by_one(fresh, plain, singles), CLIP)
        wanted = {n: g for n, g in wanted.items() if bool(g.any())}
        assert name in wanted
        found = {n: model.get_parameter(n).grad * EXPECTED for n in wanted}  # type: ignore[operator]
        assert relative_error(found, wanted) < 1e-4
        right += 1
    assert left_out == 1 and right >= 2
    assert name not in training.plan.frozen_parameters


@pytest.mark.parametrize(
    "changes", [{"grad_sample_mode": "hooks"}, {"clipping": "per_layer", "max_grad_norm": [CLIP] * 8}]
)
def test_a_step_is_refused_where_nothing_can_be_decided_anew(changes: dict[str, Any]) -> None:
    training = private(model := Tasks(), training_step=lambda m, batch: by_argument(m, batch, "a"), **changes)
    _, optimizer, loader = training
    optimizer.zero_grad()
    by_argument(model, next(iter(loader)), "b").backward()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(
        dpfix.PlanBrokenError, match=r"gradient reached `heads.b.bias`, `heads.b.weight` .* go on untrained"
    ):
        optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))


def test_no_engine_of_opacus_is_chosen_where_a_parameter_may_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "ENOUGH", 9)  # however many of dpfix's own are right
    tried = private(Tasks(), training_step=lambda m, batch: by_argument(m, batch, "a")).report.evidence
    told = {e.engine: e.reason for e in tried if not e.passed}
    assert all("could not give way" in told[name] for name in ("hooks", "functorch"))
    tried = private(nn.Sequential(nn.Linear(6, 3)), training_step=plain).report.evidence
    assert {"hooks", "functorch"} <= {e.engine for e in tried if e.passed}


def test_gradient_that_is_thrown_away_is_none() -> None:
    training = private(model := Tasks(), training_step=lambda m, batch: by_argument(m, batch, "a"))
    _, optimizer, loader = training
    for batch in loader:
        by_argument(model, batch, "b").backward()
        optimizer.zero_grad()
        by_argument(model, batch, "a").backward()
        optimizer.step()
    assert "heads.b.weight" in training.plan.frozen_parameters


class Recomputed(Tasks):
    """Both heads are computed anew in the backward pass, of which one is used."""

    def forward(self, x: Tensor, task: str | None = None) -> Any:
        return checkpoint(self.both, x, use_reentrant=False)

    def both(self, x: Tensor) -> Any:
        h = torch.tanh(self.trunk(x))
        return self.heads["a"](h), self.heads["b"](h)


def test_a_checkpoint_repeats_what_was_computed() -> None:
    training = private(model := Recomputed(), training_step=lambda m, batch: by_output(m, batch, "a"))
    _, optimizer, loader = training
    for batch in loader:
        optimizer.zero_grad()
        by_output(model, batch, "a").backward()
        optimizer.step()
    assert "heads.b.weight" in training.plan.frozen_parameters
    assert model.heads["a"].weight.grad is not None


class Interrupted(Tasks):
    stops = False

    def forward(self, x: Tensor, task: str | None = None) -> Tensor:
        if self.stops:
            raise KeyboardInterrupt
        return super().forward(x, task)


def test_an_interrupted_call_leaves_the_parameters_in_place() -> None:
    model = Interrupted()
    before = dict(model.named_parameters())
    private(model, training_step=lambda m, batch: by_argument(m, batch, "a"))
    model.stops = True
    with pytest.raises(KeyboardInterrupt):
        model(torch.ones(2, 6), "a")
    assert all(p is before[name] for name, p in model.named_parameters())
    assert not model.heads["b"].weight.requires_grad

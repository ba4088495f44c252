"""Optimizers with steps of their own: each right, or refused at the call with a way out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import dpfix
from tests.helpers import points, setting, train


def net() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


class SAM(Optimizer):
    """As it is usually written: two steps, with a gradient each, around another optimizer."""

    def __init__(self, params: Any, base: type[Optimizer], rho: float = 0.05, **options: Any) -> None:
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        raise AssertionError("never reached")

    second_step = first_step

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        assert closure is not None


class LineSearch(torch.optim.SGD):
    """Evaluates the loss itself."""

    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
        return super().step(closure)


class ScheduleFree(Optimizer):
    """Averages the iterates; ``eval()`` and ``train()`` exchange the average and the point that is moved."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})
        self.steps, self.seen = 0, list[Any]()

    def _exchange(self) -> None:
        self.seen += [p.grad for group in self.param_groups for p in group["params"]]
        with torch.no_grad():
            for p, state in self.state.items():
                state["other"], kept = p.clone(), state["other"]
                p.copy_(kept)

    def eval(self) -> None:
        self._exchange()

    def train(self) -> None:
        if self.steps:
            self._exchange()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        self.steps += 1
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad)
                average = self.state[p].setdefault("other", p.clone())
                average.lerp_(p, 1 / self.steps)


class EightBit(Optimizer):
    """Keeps its momentum in whole numbers."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                kept = state["m"].float() * state["scale"] if state else torch.zeros_like(p)
                m = kept.mul_(0.9).add_(p.grad)
                state["scale"] = m.abs().max() / 127 + 1e-12
                state["m"] = (m / state["scale"]).round().to(torch.int8)
                p.sub_(group["lr"] * m)


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda p: SAM(p, torch.optim.SGD, lr=0.1), r"SAM makes a step in several calls \(first_step, second_step\)"),
        (lambda p: LineSearch(p, lr=0.1), r"LineSearch.step\(\) needs a closure"),
        (torch.optim.LBFGS, "LBFGS evaluates the loss several times"),
    ],
)
def test_steps_with_several_gradients_are_refused_at_the_call(build: Callable[[Any], Optimizer], text: str) -> None:
    model = net()
    with pytest.raises(dpfix.OptimizerError, match=rf"DPF010.*{text}[\s\S]*help: use .*SGD, Adam, AdamW"):
        dpfix.make_private_safe(**setting(model, optimizer=build(model.parameters())))


BUILD: dict[str, Callable[[Any], Optimizer]] = {
    "fused Adam": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "foreach AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "quantised state": lambda p: EightBit(p, 0.05),
    "schedule-free": lambda p: ScheduleFree(p, 0.05),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}


@pytest.mark.parametrize("build", BUILD.values(), ids=BUILD)
def test_an_optimizer_of_its_own_gets_the_private_gradient(build: Callable[[Any], Optimizer]) -> None:
    """Without noise and clipping it moves the parameters as it does alone."""
    model = net()
    plain = copy.deepcopy(model)
    alone = build(plain.parameters())
    given = setting(model, optimizer=build(model.parameters()), noise_multiplier=0.0, max_grad_norm=1e6)
    training = dpfix.make_private_safe(**given, poisson_sampling=False)
    assert train(training, 3) == 3
    x, y = points().tensors
    for i in range(3):
        alone.zero_grad()
        nn.functional.cross_entropy(plain(x[8 * i : 8 * i + 8]), y[8 * i : 8 * i + 8]).backward()
        alone.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


def test_methods_of_its_own_are_there_and_see_no_gradient() -> None:
    model = net()
    own = ScheduleFree(model.parameters(), 0.05)
    training = dpfix.make_private_safe(**setting(model, optimizer=own))
    optimizer: Any = training[1]
    optimizer.train()
    train(training, 2)
    moved = [p.detach().clone() for p in model.parameters()]
    assert model[0].weight.grad is not None
    optimizer.eval()
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), moved, strict=True))
    assert own.seen and all(g is None for g in own.seen)
    assert model[0].weight.grad is not None
    optimizer.train()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), moved, strict=True))
    train(training, 1)
    with pytest.raises(AttributeError, match="first_step"):
        optimizer.first_step()


def two(model: Any) -> tuple[Optimizer, Optimizer]:
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    return torch.optim.Muon(matrices, lr=0.05), torch.optim.AdamW(others, lr=0.01)


def test_a_pair_of_optimizers_has_a_way_out() -> None:
    model = net()
    muon, _ = two(model)
    with pytest.raises(dpfix.OptimizerError, match=r"DPF010.*lacks 2[\s\S]*dpfix.JoinedOptimizer\(first, second\)"):
        dpfix.make_private_safe(**setting(model, optimizer=muon))
    with pytest.raises(dpfix.ArgumentError, match=r"optimizer is tuple[\s\S]*JoinedOptimizer"):
        dpfix.make_private_safe(**setting(model, optimizer=two(model)))


def test_joined_optimizers_move_as_both_do_alone() -> None:
    model = net()
    plain = copy.deepcopy(model)
    pair = two(plain)
    schedule = torch.optim.lr_scheduler.StepLR(pair[0], 1, 0.5)
    given = two(model)
    mine = torch.optim.lr_scheduler.StepLR(given[0], 1, 0.5)
    joined = dpfix.JoinedOptimizer(*given)
    training = dpfix.make_private_safe(
        **setting(model, optimizer=joined, noise_multiplier=0.0, max_grad_norm=1e6, poisson_sampling=False)
    )
    x, y = points().tensors
    for i, (a, b) in enumerate(training[2]):
        training[1].zero_grad()
        nn.functional.cross_entropy(training[0](a), b).backward()
        training[1].step()
        mine.step()
        for one in pair:
            one.zero_grad()
        nn.functional.cross_entropy(plain(x[8 * i : 8 * i + 8]), y[8 * i : 8 * i + 8]).backward()
        for one in pair:
            one.step()
        schedule.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-2, atol=1e-3)
    assert joined.param_groups[0]["lr"] == pytest.approx(0.05 / 8)


def test_joined_optimizers_save_and_load_their_state() -> None:
    model = net()
    joined = dpfix.JoinedOptimizer(*two(model))
    for step in range(4):
        if step == 2:
            weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(joined.state_dict())
        joined.zero_grad()
        nn.functional.cross_entropy(model(points().tensors[0]), points().tensors[1]).backward()
        joined.step()
    again = net()
    again.load_state_dict(weights)
    other = dpfix.JoinedOptimizer(*two(again))
    other.load_state_dict(state)
    copied, of = copy.deepcopy((again, other))
    for trained, optimizer in ((again, other), (copied, of)):
        for _ in range(2):
            optimizer.zero_grad()
            nn.functional.cross_entropy(trained(points().tensors[0]), points().tensors[1]).backward()
            optimizer.step()
        for p, q in zip(model.parameters(), trained.parameters(), strict=True):
            torch.testing.assert_close(p, q)


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda m: ("no",), "a str, not"),
        (lambda m: (), "no parameter"),
        (lambda m: (two(m)[0],) * 2, "one parameter twice"),
    ],
)
def test_what_cannot_be_joined_is_refused(build: Callable[[Any], Any], text: str) -> None:
    with pytest.raises(dpfix.OptimizerError, match=text):
        dpfix.JoinedOptimizer(*build(net()))


def test_another_step_of_a_joined_optimizer_is_refused() -> None:
    model = net()
    pair = two(model)
    training = dpfix.make_private_safe(**setting(model, optimizer=dpfix.JoinedOptimizer(*pair)))
    train(training, 1)
    with pytest.raises(dpfix.MisuseError, match="past the private optimizer"):
        pair[1].step()

"""The user's optimizer object goes on: state, groups, hyper-parameters and schedulers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dpfix
from tests.helpers import points, setting, train


def model_with_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ELU(inplace=True), nn.Linear(16, 3))


def plain_steps(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    x, y = points().tensors
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def test_same_object_steps_inside() -> None:
    given = setting(model_with_norm())
    _, optimizer, _ = dpfix.make_private_safe(**given)
    assert optimizer.original_optimizer is given["optimizer"]


def test_adam_state_of_earlier_steps_survives_a_repair() -> None:
    model = model_with_norm()
    adam = torch.optim.Adam(model.parameters(), lr=0.01, betas=(0.8, 0.9))
    plain_steps(model, adam)
    before = {id(p): {k: v.clone() for k, v in state.items()} for p, state in adam.state.items()}
    norm = model[1]
    _, optimizer, _ = training = dpfix.make_private_safe(**setting(model, optimizer=adam))
    assert model[1] is not norm and model[1].weight is norm.weight
    assert {id(p) for p in adam.state} == before.keys()
    for p, state in adam.state.items():
        assert all(torch.equal(state[k], v) for k, v in before[id(p)].items())
    train(training, 2)
    assert all(float(state["step"]) == 5 for state in adam.state.values())
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)


@pytest.mark.parametrize("stepping", ["before", "after"])
def test_schedulers_keep_working(stepping: str) -> None:
    """A scheduler created before the call acts on the private training."""
    model = model_with_norm()
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(sgd, step_size=1, gamma=0.5)
    if stepping == "before":
        plain_steps(model, sgd, 1)
        scheduler.step()
    training = dpfix.make_private_safe(**setting(model, optimizer=sgd))
    train(training, 1)
    scheduler.step()
    rate = 0.25 if stepping == "before" else 0.5
    assert training[1].param_groups[0]["lr"] == sgd.param_groups[0]["lr"] == rate
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(training, 1)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] - rate * p.grad)


def test_two_groups_stay_two_groups() -> None:
    model = model_with_norm()
    groups = [
        {"params": [model[0].weight, model[1].bias], "lr": 0.5, "weight_decay": 0.1},
        {"params": [model[0].bias, model[1].weight, *model[3].parameters()], "lr": 0.0},
    ]
    held = [[id(p) for p in g["params"]] for g in groups]
    sgd = torch.optim.SGD(groups, lr=1.0)
    training = dpfix.make_private_safe(**setting(model, optimizer=sgd))
    assert [[id(p) for p in g["params"]] for g in training[1].param_groups] == held
    assert [g["lr"] for g in sgd.param_groups] == [0.5, 0.0]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(training, 1)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p.detach(), before[n])}
    assert moved == {"0.weight", "1.bias"}


def test_frozen_parameters_in_the_optimizer_stay_put() -> None:
    model = model_with_norm()
    model[0].requires_grad_(False)
    training = dpfix.make_private_safe(**setting(model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0)))
    before = model[0].weight.detach().clone()
    train(training, 2)
    assert torch.equal(model[0].weight, before)


def test_momentum_of_the_private_steps_is_the_optimizers() -> None:
    model = nn.Sequential(nn.Linear(6, 3))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(dpfix.make_private_safe(**setting(model, optimizer=sgd)), 2)
    assert all("momentum_buffer" in sgd.state[p] for p in model.parameters())


def test_learning_rate_changed_on_either_object_counts() -> None:
    given = setting()
    _, optimizer, _ = dpfix.make_private_safe(**given)
    optimizer.param_groups[0]["lr"] = 0.7
    assert given["optimizer"].param_groups[0]["lr"] == 0.7

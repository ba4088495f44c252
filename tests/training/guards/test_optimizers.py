"""How the loop may call optimizers."""

from __future__ import annotations

import copy
import itertools
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dpfix
from dpfix.training.guards.optimizers import WATCHED
from tests.cases import mlp
from tests.training.steps import every_engine, first_batch, loss_of, refused, start, values


@every_engine
def test_step_of_the_original_optimizer_is_refused(engine: str) -> None:
    model, training = start(engine)
    loss_of(training, first_batch(training)).backward()
    refused(model, dpfix.MisuseError, "past the private optimizer", training[1].original_optimizer.step)
    training[1].step()


def test_grad_scaler_is_refused() -> None:
    model, training = start()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(training, first_batch(training))).backward()
    refused(model, dpfix.MisuseError, "GradScaler", lambda: scaler.step(training[1]))


@every_engine
def test_zero_grad_of_a_model_that_is_not_wrapped_clears_what_the_optimizers_does(engine: str) -> None:
    trained, untrained = [], mlp()
    for by_model in (False, True):
        model, training = start(engine, model=copy.deepcopy(untrained), wrap_model=False, noise_multiplier=0.0, seed=1)
        for batch in training[2]:
            loss_of((model,), batch).backward()
            training[1].step()
            (model if by_model else training[1]).zero_grad()
        trained.append(values(model))
        training[0].cleanup()
        assert "zero_grad" not in vars(model)
    assert torch.allclose(*trained)


class Around(nn.Module):
    """What a framework puts around a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def by_hand(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = None


@every_engine
def test_gradients_that_are_cleared_past_the_optimizer_are_cleared(engine: str) -> None:
    trained, untrained = [], mlp()
    for clear in (
        None,
        by_hand,
        lambda m: torch.compile(m, backend="eager").zero_grad(),
        lambda m: Around(m).zero_grad(),
    ):
        model, training = start(engine, model=copy.deepcopy(untrained), noise_multiplier=0.0, seed=1)
        for batch in training[2]:
            loss_of(training, batch).backward()
            training[1].step()
            training[1].zero_grad() if clear is None else clear(model)
        trained.append(values(model))
    assert all(torch.allclose(trained[0], other) for other in trained[1:])


@every_engine
def test_gradients_that_are_not_cleared_are_refused(engine: str) -> None:
    model, training = start(engine)

    def act() -> None:
        for batch in training[2]:
            loss_of(training, batch).backward()
            training[1].step()
            before.copy_(values(model))
            next(iter(model.parameters())).grad = None  # one of several

    before = values(model)
    with pytest.raises(dpfix.AccumulationError, match="zero_grad"):
        act()
    assert torch.equal(values(model), before)


def test_grad_scaler_that_was_asked_to_unscale_is_refused() -> None:
    """The scripts that clip the norm of the sum call ``unscale_`` first; the scaler then hands over no scale."""
    model, training = start()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(training, first_batch(training))).backward()
    scaler.unscale_(training[1])
    refused(model, dpfix.MisuseError, "GradScaler", lambda: scaler.step(training[1]))


class Pair:
    """A private model and another one in one loop, each with its optimizer."""

    def __init__(self, *, through_private: bool, on_data: bool) -> None:
        self.model, self.training = start()
        self.other = nn.Linear(6, 6)
        self.optimizer = torch.optim.SGD(self.other.parameters(), lr=0.1)
        self.through_private, self.on_data = through_private, on_data

    def private_step(self, batch: Any) -> None:
        self.training[1].zero_grad()
        loss_of(self.training, batch).backward()
        self.training[1].step()

    def other_step(self, batch: Any) -> None:
        x, _ = batch
        self.optimizer.zero_grad()
        made = self.other(x if self.on_data else torch.randn_like(x))
        loss = self.training[0](made).square().mean() if self.through_private else made.square().mean()
        loss.backward()
        self.optimizer.step()

    def run(self, first: str) -> None:
        for batch in itertools.islice(self.training[2], 2):
            steps = [self.private_step, self.other_step]
            for step in steps if first == "private" else reversed(steps):
                step(batch)


order = pytest.mark.parametrize("first", ["private", "other"])


@order
def test_a_second_model_that_learns_from_the_batches_is_named(first: str) -> None:
    pair = Pair(through_private=False, on_data=True)
    with pytest.warns(dpfix.DPFixWarning, match=r"SGD.step\(\): it trains another model .* shape \(6, 6\)") as told:
        pair.run(first)
    assert len(told) == 1


@order
def test_a_second_model_that_learns_from_the_batches_through_the_private_one_is_refused(first: str) -> None:
    with pytest.raises(dpfix.MisuseError, match=r"a parameter of shape \(6, 6\) that is not in the private model"):
        Pair(through_private=True, on_data=True).run(first)


def test_a_head_on_the_private_models_outputs_is_refused_though_they_are_detached() -> None:
    _, training = start()
    head = nn.Linear(3, 3)
    x, y = first_batch(training)
    F.cross_entropy(head(training[0](x).detach()), y).backward()
    with pytest.raises(dpfix.MisuseError, match=r"a parameter of shape \(3, 3\) that is not in the private model"):
        torch.optim.SGD(head.parameters(), lr=0.1).step()


@order
@pytest.mark.parametrize("through_private", [True, False])
def test_a_generator_that_sees_no_data_is_nobodys_business(first: str, through_private: bool) -> None:
    pair = Pair(through_private=through_private, on_data=False)
    before = pair.other.weight.detach().clone()
    pair.run(first)
    assert not torch.equal(before, pair.other.weight)


def test_a_number_of_an_earlier_step_of_the_generator_teaches_it_nothing() -> None:
    """``item()`` of the generator's loss, read after its step, is no part of the next private loss."""
    pair = Pair(through_private=True, on_data=False)
    for batch in itertools.islice(pair.training[2], 3):
        pair.private_step(batch)
        x, _ = batch
        pair.optimizer.zero_grad()
        loss = pair.training[0](pair.other(torch.randn_like(x))).square().mean()
        loss.backward()
        pair.optimizer.step()
        loss.item()


def test_a_head_with_the_id_of_one_that_another_training_knew_is_refused_all_the_same() -> None:
    _, earlier = start()
    _, training = start()
    head = nn.Linear(3, 3)
    for p in head.parameters():
        WATCHED[id(p)] = (weakref.ref(earlier[1].guard.others),)
    x, y = first_batch(training)
    F.cross_entropy(head(training[0](x)), y).backward()
    with pytest.raises(dpfix.MisuseError, match=r"a parameter of shape \(3, 3\) that is not in the private model"):
        torch.optim.SGD(head.parameters(), lr=0.1).step()

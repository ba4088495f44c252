"""The model and the optimizer's groups are those that were audited."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import dpfix
from tests.cases import FixedNorm, mlp
from tests.helpers import train
from tests.training.steps import every_engine, first_batch, loss_of, refused, start, values


class Fixed(FixedNorm):
    """Its BatchNorm is frozen by hand, so ``train()`` switches it on."""

    def train(self, mode: bool = True) -> Fixed:
        return nn.Module.train(self, mode)  # type: ignore[return-value]


def test_batch_norm_switched_on_is_refused() -> None:
    model = Fixed()
    model.body[1].eval()
    data = DataLoader([(torch.randn(2, 6, 6), i % 3) for i in range(24)], batch_size=8)
    _, training = start(model=model, data_loader=data)
    loss_of(training, first_batch(training)).backward()
    training[1].step()
    training[1].zero_grad()
    training[0].train()
    batch = first_batch(training)
    refused(
        model,
        dpfix.PlanBrokenError,
        r"`body\.1`.*eval",
        lambda: (loss_of(training, batch).backward(), training[1].step()),
    )


def test_replaced_layer_is_refused() -> None:
    model, training = start()
    batch = first_batch(training)
    model[2] = nn.Linear(8, 3)
    before = values(model)
    with pytest.raises(dpfix.MisuseError):
        loss_of(training, batch).backward()
        training[1].step()
    assert torch.equal(values(model), before)


@every_engine
@pytest.mark.parametrize("flag", ["freeze", "unfreeze"])
def test_changed_requires_grad_is_refused(engine: str, flag: str) -> None:
    model = mlp()
    model[0].bias.requires_grad_(flag == "freeze")
    _, training = start(engine, model=model)
    model[0].bias.requires_grad_(flag == "unfreeze")
    batch = first_batch(training)

    def act() -> None:
        loss_of(training, batch).backward()
        training[1].step()

    refused(model, dpfix.PlanBrokenError, r"`0\.bias`", act)


@every_engine
def test_added_layer_without_parameters_is_refused(engine: str) -> None:
    model, training = start(engine)
    model.append(nn.Softmax(dim=0))
    batch = first_batch(training)
    refused(
        model,
        dpfix.PlanBrokenError,
        rf"module `{len(model) - 1}`",
        lambda: (loss_of(training, batch).backward(), training[1].step()),
    )


def test_parameter_moved_to_another_group_is_accepted_and_one_taken_out_is_not() -> None:
    model, training = start()
    assert train(training, 1) == 1
    groups = training[1].param_groups
    groups.append({**groups[0], "params": [groups[0]["params"].pop()]})
    assert train(training, 2) == 2
    groups.pop()
    training[1].zero_grad()
    loss_of(training, first_batch(training)).backward()
    refused(model, dpfix.PlanBrokenError, "param_groups", training[1].step)


def test_added_group_is_refused() -> None:
    model, training = start()
    training[1].original_optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    loss_of(training, first_batch(training)).backward()
    refused(model, dpfix.PlanBrokenError, "param_groups", training[1].step)

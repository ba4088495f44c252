"""Copies of a private optimizer: they hold its state, release nothing, and leave the original as it is."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

import dpfix
from tests.helpers import setting, train
from tests.training.steps import every_engine, start

duplicated = pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, copy.copy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "copy", "pickle"]
)


@duplicated
@every_engine
def test_the_original_trains_on(engine: str, duplicate: Callable[[Any], Any]) -> None:
    _, training = start(engine)
    train(training, 1)
    duplicate(training[1])
    assert train(training, 2) == 2
    _, other = start(engine)
    assert train(other, 2) == 2


@duplicated
def test_a_copy_holds_the_state_and_does_not_step(duplicate: Callable[[Any], Any]) -> None:
    model = torch.nn.Linear(6, 3)
    training = dpfix.make_private_safe(**setting(model, optimizer=torch.optim.Adam(model.parameters(), lr=0.01)))
    train(training, 2)
    copied = duplicate(training[1])
    assert copied is not training[1] and copied.param_groups[0]["lr"] == 0.01
    for name, value in training[1].state_dict()["state"][0].items():
        assert torch.equal(copied.state_dict()["state"][0][name], value)
    with pytest.raises(dpfix.MisuseError, match="a copy of a private optimizer"):
        copied.step()
    copied.zero_grad()
    duplicate(copied)
    training[1].load_state_dict(copied.state_dict())
    assert train(training, 1) == 1

"""Steps that a guard sees, for its tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dpfix
from dpfix.engines import ENGINES
from tests.cases import mlp
from tests.helpers import setting, sgd

every_engine = pytest.mark.parametrize("engine", ENGINES)


def start(engine: str = "auto", **changes: Any) -> tuple[nn.Module, dpfix.PrivateTraining]:
    model = changes.pop("model", None) or mlp()
    given = setting(model, grad_sample_mode=engine, **({"optimizer": sgd(model)} | changes))
    return model, dpfix.make_private_safe(**given)


def loss_of(training: Any, batch: Any) -> Tensor:
    return F.cross_entropy(training[0](batch[0]), batch[1])


def values(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def refused(model: nn.Module, error: type[Exception], says: str, act: Callable[[], Any]) -> None:
    """The act is refused with a message, and no parameter has moved."""
    before = values(model)
    with pytest.raises(error, match=says) as caught:
        act()
    assert torch.equal(values(model), before)
    assert isinstance(caught.value, dpfix.MisuseError) and len(str(caught.value)) >= 40


def first_batch(training: Any) -> Any:
    return next(batch for batch in training[2] if len(batch[0]))

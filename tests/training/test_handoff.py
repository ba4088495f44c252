"""What a private training holds, and what holds it."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

import dpfix
from dpfix.engines import ENGINES
from dpfix.training.in_training import holder_of
from tests.cases import mlp
from tests.helpers import setting, sgd, train

every_engine = pytest.mark.parametrize("engine", ENGINES)
wrapped_or_not = pytest.mark.parametrize("wrap", [True, False], ids=["wrapped", "bare"])


def start(engine: str, wrap: bool = True) -> tuple[nn.Module, Any]:
    model = mlp()
    if engine == "ew" and not wrap:
        pytest.skip("Opacus's expanded weights work through its wrapper")
    training = dpfix.make_private_safe(**setting(model, grad_sample_mode=engine, wrap_model=wrap))
    train((training[0] if wrap else model, training[1], training[2]), 2)
    return model, training


@every_engine
@wrapped_or_not
def test_a_training_that_the_script_drops_is_gone(engine: str, wrap: bool) -> None:
    """Models, data loaders and what an engine keeps are large; a sweep over settings makes hundreds of them."""
    model, training = start(engine, wrap)
    parts = (model, *training, training[1].guard, training[1].guard.guarded.handle, training[2].dataset)
    references = [weakref.ref(part) for part in parts]
    del model, training, parts
    gc.collect()
    assert [r() for r in references] == [None] * len(references)


@every_engine
@wrapped_or_not
def test_a_model_whose_training_is_dropped_can_be_made_private_again(engine: str, wrap: bool) -> None:
    """The earlier training is found on the model: two engines at work would count every gradient twice."""
    model, training = start(engine, wrap)
    earlier = weakref.ref(training[1].guard)
    del training
    again = dpfix.make_private_safe(**setting(model, grad_sample_mode=engine, wrap_model=wrap))
    gc.collect()
    assert earlier() is None
    assert train((again[0] if wrap else model, again[1], again[2]), 2) == 2
    again[0].cleanup()
    assert holder_of(model) is None and not model._forward_pre_hooks and not model._forward_hooks


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_a_copy_of_a_bare_model_is_not_in_training(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    """Making the copy private must not end the training of the original."""
    model, training = start("bookkeeping", wrap=False)
    copied = duplicate(model)
    assert holder_of(copied) is None and holder_of(model) is training[0]
    other = dpfix.make_private_safe(**setting(copied, optimizer=sgd(copied, 0.1), wrap_model=False))
    assert holder_of(copied) is other[0] and holder_of(model) is training[0]
    assert train((model, *training[1:]), 2) == 2


def test_a_model_may_hold_its_own_wrapper() -> None:
    """As Lightning modules do that are made private in configure_optimizers; what is copied for checks holds the copy."""
    given = setting(mlp())
    del given["criterion"]
    training = dpfix.make_private_safe(**given)
    given["module"].dp = {"model": training[0]}
    assert train(training, 2) == 2
    copied = copy.deepcopy(training[0])
    assert copied._module.dp["model"] is copied._module and copied._module is not given["module"]

"""Values of a call: booleans are booleans, one number is a number, and nothing else gets through."""

from __future__ import annotations

import copy
import math
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from opacus import PrivacyEngine
from torch import nn
from torch.utils.data import DataLoader

import dpfix
from dpfix.scan.values import shown
from tests.cases import mlp
from tests.helpers import generator_states, points, same_generators, setting, sgd

BOOLEANS = ("poisson_sampling", "batch_first", "wrap_model", "rand_on_empty", "no_grad_regions", "cache")
ADAPTIVE = {
    "clipping": "adaptive", "target_unclipped_quantile": 0.5, "clipbound_learning_rate": 0.2, "max_clipbound": 10.0,
    "min_clipbound": 0.01, "unclipped_num_std": 1.0,
}  # fmt: skip


@pytest.mark.parametrize("name", BOOLEANS)
def test_what_is_no_boolean_is_refused(name: str) -> None:
    for value in (None, 0, 1, "False", "", [], torch.tensor([True, False]), math.nan):
        with pytest.raises(dpfix.ArgumentError, match=f"{name}=.* is neither True nor False"):
            dpfix.make_private_safe(**setting(**{name: value}))


@pytest.mark.parametrize("value", [np.True_, torch.tensor(True), np.array([True])], ids=repr)
@pytest.mark.parametrize("name", BOOLEANS)
def test_booleans_of_other_libraries_are_booleans(name: str, value: Any) -> None:
    training = dpfix.make_private_safe(**setting(grad_sample_mode="bookkeeping", **{name: value}))
    assert isinstance(training[2], type(training[2])) and hasattr(training[2], "ledger")


def test_a_false_boolean_of_numpy_is_false() -> None:
    loader = DataLoader(points(), batch_size=8)
    training = dpfix.make_private_safe(**setting(data_loader=loader, poisson_sampling=np.False_, wrap_model=np.False_))
    assert training[2] is loader and not isinstance(training[0], nn.Module)


@pytest.mark.parametrize(
    "one", [torch.tensor(1.5), torch.tensor([1.5]), np.float32(1.5), np.array([[1.5]]), Fraction(3, 2)], ids=repr
)
def test_one_number_is_a_number(one: Any) -> None:
    training = dpfix.make_private_safe(**setting(noise_multiplier=one, max_grad_norm=one, seed=torch.tensor(7)))
    assert training[1].noise_multiplier == training[1].max_grad_norm == 1.5
    assert type(training[1].noise_multiplier) is type(training[1].max_grad_norm) is float
    assert training[1].randomness.seed == 7
    assert training.get_epsilon(torch.tensor(1e-3)) == 0.0
    norms = dpfix.make_private_safe(**setting(clipping="per_layer", max_grad_norm=[one] * 4))[1].max_grad_norms
    assert norms == [1.5] * 4


@pytest.mark.parametrize("value", [10**400, math.nan, math.inf, -1, "1.0", None, True, 1j, [], torch.ones(2), object()])
def test_what_is_no_number_is_refused(value: Any) -> None:
    for name in ("noise_multiplier", "max_grad_norm"):
        with pytest.raises(dpfix.ArgumentError, match=name):
            dpfix.make_private_safe(**setting(**{name: value}))
    for name in ("target_epsilon", "target_delta", "epochs"):
        with pytest.raises(dpfix.ArgumentError, match=name.removeprefix("target_")):
            budget(**{name: value})
    training = dpfix.make_private_safe(**setting(grad_sample_mode="bookkeeping"))
    for ask in (training.get_epsilon, training.statement, training.privacy_engine.get_epsilon):
        with pytest.raises(dpfix.ArgumentError, match="delta"):
            ask(value)


def budget(**changes: Any) -> dpfix.PrivateTraining:
    given = setting(target_epsilon=5.0, target_delta=1e-3, epochs=2, grad_sample_mode="bookkeeping") | changes
    del given["noise_multiplier"]
    return dpfix.make_private_safe_with_epsilon(**given)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "missing"),
        ({"max_clipbound": 0.001}, "max_clipbound"),
        ({"unclipped_num_std": 0.1}, "unclipped_num_std"),
        ({"min_clipbound": "x"}, "min_clipbound"),
        ({"min_clipbound": -1.0}, "min_clipbound"),
        ({"target_unclipped_quantile": math.nan}, "target_unclipped_quantile"),
        ({"target_unclipped_quantile": 1.5}, "target_unclipped_quantile"),
        ({"clipbound_learning_rate": 10**400}, "clipbound_learning_rate"),
    ],
)
def test_options_of_adaptive_clipping_are_checked(changes: dict[str, Any], words: str) -> None:
    options = ADAPTIVE | changes if changes else {"clipping": "adaptive"}
    with pytest.raises(dpfix.ArgumentError, match=words):
        dpfix.make_private_safe(**setting(**options))


class Unfinished(nn.Module):
    """Its constructor forgets super().__init__()."""

    def __init__(self) -> None:
        pass


def without_init(kind: type[Any]) -> Any:
    return kind.__new__(kind)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("module", Unfinished()),
        ("module", None),
        ("optimizer", without_init(torch.optim.SGD)),
        ("optimizer", "adam"),
        ("data_loader", without_init(DataLoader)),
        ("data_loader", points()),
        ("privacy_engine", 3),
        ("privacy_engine", PrivacyEngine),
        ("privacy_engine", without_init(PrivacyEngine)),
        ("augmentation", 3),
        ("noise_generator", 3),
        ("criterion", 3),
        ("training_step", "loss"),
    ],
)
def test_objects_of_another_kind_are_refused(name: str, value: Any) -> None:
    for call in (dpfix.make_private_safe, dpfix.make_private_safe_with_epsilon):
        given = setting(**{"target_epsilon": 5.0, "target_delta": 1e-3, "epochs": 2, name: value})
        unknown = (
            ("target_epsilon", "target_delta", "epochs") if call is dpfix.make_private_safe else ("noise_multiplier",)
        )
        for other in unknown:
            del given[other]
        with pytest.raises(dpfix.DPFixError, match=name):
            call(**given)


@pytest.mark.parametrize("name", ["loss_reduction", "grad_sample_mode", "norm", "clipping"])
def test_a_choice_that_cannot_be_shown_is_refused(name: str) -> None:
    with pytest.raises(dpfix.ArgumentError, match=f"{name}=a Unfinished that cannot be shown"):
        dpfix.make_private_safe(**setting(**{name: Unfinished()}))


def test_an_engine_whose_accountant_was_taken_away_is_refused() -> None:
    engine = PrivacyEngine()
    engine.accountant = None
    with pytest.raises(dpfix.ArgumentError, match="privacy_engine"):
        dpfix.make_private_safe(**setting(privacy_engine=engine))


# ------------------------------------------------------------------ calls at random

JUNK: tuple[Callable[[], Any], ...] = (
    lambda: None, lambda: True, lambda: False, lambda: 0, lambda: 1, lambda: -3, lambda: 0.5, lambda: 10**400,
    lambda: -(10**400), lambda: math.nan, lambda: math.inf, lambda: 1e-320, lambda: 1e300, lambda: "", lambda: "flat",
    lambda: "auto", lambda: "False", lambda: b"x", lambda: [], lambda: [1.0], lambda: [1.0, "x"], lambda: (1.0,) * 4,
    lambda: {}, lambda: {1, 2}, object, lambda: torch.tensor(1.0), lambda: torch.ones(3), lambda: torch.tensor(math.nan),
    lambda: torch.zeros(0), lambda: np.float64(2), lambda: np.True_, lambda: np.array([1, 2]), lambda: np.array("x"),
    lambda: 1j, lambda: Fraction(1, 3), lambda: lambda *_: 1, lambda: int, lambda: nn.Linear(2, 2), mlp,
    lambda: sgd(mlp()), lambda: DataLoader(points(), batch_size=4), points, PrivacyEngine, Unfinished,
    lambda: without_init(torch.optim.SGD), lambda: without_init(DataLoader), lambda: without_init(PrivacyEngine),
    torch.Generator, nn.MSELoss, lambda: "x" * 100_000, lambda: range(3), lambda: ..., lambda: NotImplemented,
)  # fmt: skip
"""Makers of values that some argument may be given."""

ARGUMENTS = (
    "module", "optimizer", "data_loader", "max_grad_norm", "criterion", "training_step", "privacy_engine", "batch_first",
    "loss_reduction", "poisson_sampling", "clipping", "noise_generator", "seed", "grad_sample_mode", "augmentation",
    "wrap_model", "rand_on_empty", "norm", "no_grad_regions", "cache", "target_unclipped_quantile", "min_clipbound",
    "unclipped_num_std", "teleport",
)  # fmt: skip
OF_ONE_CALL = {
    dpfix.make_private_safe: ("noise_multiplier",),
    dpfix.make_private_safe_with_epsilon: (
        "target_epsilon", "target_delta", "epochs", "epsilon_tolerance", "eps_error", "delta_error", "alphas",
    ),
}  # fmt: skip


@dataclass
class Fuzzed:
    """What came of calls at random: successes, errors that are none of dpfix's, refusals that left a trace."""

    successes: int = 0
    raw: list[str] = field(default_factory=list)
    traces: list[str] = field(default_factory=list)


def fuzzed(calls: int, seed: int) -> Fuzzed:
    draw, found = random.Random(seed), Fuzzed()
    for number in range(calls):
        call = draw.choice(list(OF_ONE_CALL))
        given = setting(grad_sample_mode="bookkeeping", cache=False)
        if call is not dpfix.make_private_safe:
            del given["noise_multiplier"]
            given |= {"target_epsilon": 5.0, "target_delta": 1e-3, "epochs": 2, "epsilon_tolerance": 1.0}
        if draw.random() < 0.2:
            given |= ADAPTIVE | {"grad_sample_mode": "hooks"}
        names = draw.sample(ARGUMENTS + OF_ONE_CALL[call], k=1 if draw.random() < 0.7 else 2)
        given |= {name: draw.choice(JUNK)() for name in names}
        model, optimizer, loader = setting_objects(given)
        before = state_of(model, optimizer, loader), generator_states()
        try:
            call(**given)
            found.successes += 1
        except dpfix.DPFixError:
            if not equal(before[0], state_of(model, optimizer, loader)) or not same_generators(before[1]):
                found.traces.append(f"{number}: {call.__name__} with {names}: refused, and something changed")
        except Exception as error:  # noqa: BLE001 -- none of these may come
            told = {name: shown(given[name]) for name in names}
            found.raw.append(f"{number}: {call.__name__} with {told}: {type(error).__name__}: {str(error)[:100]}")
    return found


def setting_objects(given: dict[str, Any]) -> tuple[Any, Any, Any]:
    """The user's objects among the arguments, as far as they are such."""
    model, optimizer, loader = given["module"], given["optimizer"], given["data_loader"]
    return (
        model if isinstance(model, nn.Module) and "_parameters" in vars(model) else None,
        optimizer if isinstance(optimizer, torch.optim.Optimizer) and "state" in vars(optimizer) else None,
        loader if isinstance(loader, DataLoader) else None,
    )


def state_of(model: Any, optimizer: Any, loader: Any) -> Any:
    kept = []
    if model is not None:
        kept += [(name, type(module), module.training, sorted(vars(module))) for name, module in model.named_modules()]
        kept += [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
        kept += [(name, p.requires_grad, p.detach().clone(), p.grad) for name, p in model.named_parameters()]
    if optimizer is not None:
        kept += [type(optimizer), copy.deepcopy(optimizer.state_dict()), sorted(vars(optimizer))]
    if loader is not None:
        kept += [type(loader), sorted(vars(loader)), [id(v) for _, v in sorted(vars(loader).items())]]
    return kept


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def check_fuzzed(calls: int, seed: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = fuzzed(calls, seed)
    wrong = found.raw + found.traces
    assert not wrong, f"{len(wrong)} of {calls}:\n" + "\n".join(wrong)
    assert calls / 50 < found.successes < calls / 2, "values that pass and values that do not have to be among them"


def test_calls_with_values_at_random_succeed_or_are_refused() -> None:
    check_fuzzed(200, seed=1)


@pytest.mark.slow
def test_many_calls_with_values_at_random_succeed_or_are_refused() -> None:
    check_fuzzed(2000, seed=2)

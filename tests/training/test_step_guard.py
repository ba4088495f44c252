"""Ways to write the loop that have to keep working under the guard, and what every check owes its reader."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dpfix
from dpfix.training.guards.budget import WithinBudget
from dpfix.training.guards.check import Check
from dpfix.training.guards.frozen_parameters import FrozenUnreached
from dpfix.training.guards.memory import BegunAgain
from dpfix.training.guards.model import FixedNorms
from dpfix.training.guards.no_grad_regions import RegionsUntouched
from dpfix.training.guards.ranks import RanksAgree
from dpfix.training.guards.scratch import ScratchPutBack
from dpfix.training.guards.shards import ShardsHeld
from tests.cases import mlp
from tests.helpers import points, sgd
from tests.reference import clipped_sum, gradients_one_by_one, relative_error
from tests.training.steps import every_engine, first_batch, loss_of, start, values


def kinds(cls: type[Check]) -> set[type[Check]]:
    return {cls}.union(*map(kinds, cls.__subclasses__()))


def test_every_check_runs_and_says_what_it_catches_and_costs() -> None:
    ran = {type(check) for check in start()[1][1].guard.checks}
    assert ran == kinds(Check) - {Check}
    assert [c.__name__ for c in ran if not {"Catches:", "Costs:"} <= set((c.__doc__ or "").split())] == []


def test_a_check_with_nothing_to_look_at_is_not_asked() -> None:
    guard = start("bookkeeping")[1][1].guard
    asked = {
        type(getattr(act, "__self__", None))
        for act in (*guard._before_step, *guard._before_noise, *guard._after_step, *guard._cleared)
    }
    assert {type(c) for c in guard.checks if not c.needed} == {
        BegunAgain, FixedNorms, FrozenUnreached, RanksAgree, RegionsUntouched, ScratchPutBack, ShardsHeld, WithinBudget,
    }  # fmt: skip
    assert not asked & {type(c) for c in guard.checks if not c.needed}


def test_nothing_is_asked_of_a_check_at_moments_it_does_not_look_at() -> None:
    """What a check costs is what it does: a step calls no empty methods."""
    guard = start()[1][1].guard
    between = {"detach", "make_way", "take_over"}
    moments = [name for name, act in vars(Check).items() if inspect.isfunction(act) and name not in between]
    called = [getattr(check, "__func__", None) for moment in moments for check in getattr(guard, f"_{moment}")]
    assert called and not {vars(Check)[moment] for moment in moments} & set(called)


def without_zero_grad(model: nn.Module, training: Any) -> None:
    for _ in range(2):
        loss_of(training, first_batch(training)).backward()
        training[1].step()


def without_draw(model: nn.Module, training: Any) -> None:
    loss_of(training, points()[:4]).backward()
    training[1].step()


def without_backward(model: nn.Module, training: Any) -> None:
    first_batch(training)
    training[1].step()


def with_fewer_rows(model: nn.Module, training: Any) -> None:
    x, y = next(batch for batch in training[2] if len(batch[0]) > 1)
    loss_of(training, (x[1:], y[1:])).backward()
    training[1].step()


def with_another_layer(model: nn.Module, training: Any) -> None:
    model.append(nn.ReLU())
    without_backward(model, training)


def with_a_frozen_layer(model: nn.Module, training: Any) -> None:
    model[0].weight.requires_grad_(False)
    without_backward(model, training)


def past_the_guard(model: nn.Module, training: Any) -> None:
    training[1].original_optimizer.step()


def not_finite(model: nn.Module, training: Any) -> None:
    (loss_of(training, first_batch(training)) * float("nan")).backward()
    training[1].step()


@pytest.mark.parametrize(
    ("act", "path"),
    [
        (without_zero_grad, "optimizer"),
        (without_draw, "data_loader"),
        (without_backward, "optimizer"),
        (with_fewer_rows, "data_loader"),
        (with_another_layer, "3"),
        (with_a_frozen_layer, "0.weight"),
        (past_the_guard, "optimizer"),
        (not_finite, "module"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_refusal_has_its_parts(act: Callable[[nn.Module, Any], None], path: str) -> None:
    """Reports show fact, reason and way out apart, and where it is; the message has them in this order."""
    with pytest.raises(dpfix.MisuseError) as caught:
        act(*start("bookkeeping"))
    (finding,) = caught.value.findings
    assert finding.fact and finding.help and finding.path == path and finding.code == type(caught.value).code
    assert str(caught.value) == " ".join(part for part in (finding.fact, finding.why, finding.help) if part)


def wanted(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    """The clipped sum at clip norm 1."""
    samples = gradients_one_by_one(
        model, lambda m, b: F.cross_entropy(m(b[0]), b[1]), [(x[None], y[None]) for x, y in zip(*batch, strict=True)]
    )
    return clipped_sum(samples, 1.0)


def assert_steps_rightly(engine: str, act: Callable[[nn.Module, Any, Any], None], steps: int = 2) -> None:
    """A way to write the loop releases the clipped sum of the batch, in the first step and the next."""
    plain = mlp()
    model, training = start(engine, model=plain, noise_multiplier=0.0)
    batches = iter(training[2])
    for _ in range(steps):
        batch = next(batches)
        reference = mlp()
        reference.load_state_dict(model.state_dict())
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        act(model, training, batch)
        moved = {n: (before[n] - p.detach()) * 8 for n, p in model.named_parameters()}
        assert relative_error(moved, wanted(reference, batch)) < 2e-3


def zero_between(model: nn.Module, training: Any, batch: Any) -> None:
    loss = loss_of(training, batch)
    training[1].zero_grad()
    loss.backward()
    training[1].step()


def forward_only_before(model: nn.Module, training: Any, batch: Any) -> None:
    training[1].zero_grad()
    loss_of(training, batch).item()
    loss_of(training, batch).backward()
    training[1].step()


def forward_only_after(model: nn.Module, training: Any, batch: Any) -> None:
    training[1].zero_grad()
    loss_of(training, batch).backward()
    training[0](batch[0])
    training[1].step()


def no_grad_logging(model: nn.Module, training: Any, batch: Any) -> None:
    training[1].zero_grad()
    loss_of(training, batch).backward()
    training[0].eval()
    with torch.no_grad():
        training[0](batch[0])
    training[0].train()
    training[1].step()


def model_zero_grad(model: nn.Module, training: Any, batch: Any) -> None:
    loss_of(training, batch).backward()
    training[0].zero_grad()
    loss_of(training, batch).backward()
    training[1].step()


def zero_grad_to_none(model: nn.Module, training: Any, batch: Any) -> None:
    training[1].zero_grad(set_to_none=True)
    loss_of(training, batch).backward()
    training[1].step()


def zero_grad_after(model: nn.Module, training: Any, batch: Any) -> None:
    loss_of(training, batch).backward()
    training[1].step()
    training[1].zero_grad()


def closure(model: nn.Module, training: Any, batch: Any) -> None:
    def evaluate() -> float:
        training[1].zero_grad()
        loss = loss_of(training, batch)
        loss.backward()
        return float(loss.detach())

    training[1].step(evaluate)


LOOPS = (
    zero_between, forward_only_before, forward_only_after, no_grad_logging, model_zero_grad, zero_grad_to_none,
    zero_grad_after, closure,
)  # fmt: skip


@every_engine
@pytest.mark.parametrize("loop", LOOPS, ids=lambda f: f.__name__)
def test_ways_to_write_the_loop(engine: str, loop: Callable[[nn.Module, Any, Any], None]) -> None:
    assert_steps_rightly(engine, loop)


@every_engine
def test_generator_learns_through_a_private_discriminator(engine: str) -> None:
    """The generator's own step sends gradient through the private model and releases nothing of its parameters."""
    discriminator, training = start(engine)
    generator = nn.Linear(4, 6)
    own = sgd(generator, 0.1)
    for x, y in training[2]:
        moved, learnt = values(discriminator), values(generator)
        training[1].zero_grad()
        F.cross_entropy(training[0](x), y).backward()
        training[1].step()
        assert not torch.equal(values(discriminator), moved)
        own.zero_grad()
        F.cross_entropy(training[0](generator(torch.randn(5, 4))), torch.zeros(5, dtype=torch.long)).backward()
        own.step()
        assert not torch.equal(values(generator), learnt)

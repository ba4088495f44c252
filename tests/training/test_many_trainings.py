"""Trainings one after another, and in several threads."""

from __future__ import annotations

import gc
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

import dpfix
from dpfix.training.follow.agenda import Agenda
from dpfix.training.guards.optimizers import WATCHED
from tests.cases import mlp
from tests.helpers import setting, sgd, train
from tests.training.steps import every_engine, first_batch, loss_of, start


def other_step() -> float:
    """The fastest of many steps of an optimizer that has nothing to do with any training."""
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.zeros(2)
    optimizer, times = torch.optim.SGD([p], lr=0.1), []
    for _ in range(200):
        begin = time.perf_counter()
        optimizer.step()
        times.append(time.perf_counter() - begin)
    return min(times)


@every_engine
def test_trainings_are_freed(engine: str) -> None:
    gc.collect()
    hooks, watched, references = len(_global_optimizer_pre_hooks), len(WATCHED), []
    for _ in range(5):
        model, training = start(engine)
        train(training, 1)
        parts = (model, training[0], training[1], training[1].original_optimizer, training[2], training[1].guard)
        references += [weakref.ref(part) for part in parts]
        del model, training, parts
    gc.collect()
    assert [r() for r in references] == [None] * 30
    assert len(WATCHED) <= watched and len(_global_optimizer_pre_hooks) <= max(hooks, 1)


def forward_alone(training: Any) -> None:
    loss_of(training, first_batch(training))


def no_step(training: Any) -> None:
    loss_of(training, first_batch(training)).backward()


def refused_step(training: Any) -> None:
    x, y = first_batch(training)
    output = training[0](x)
    with pytest.raises(dpfix.CoupledLossError):
        (F.cross_entropy(output, y) * (1 + output.mean())).backward()
        training[1].step()


@pytest.mark.parametrize("last", [forward_alone, no_step, refused_step])
@every_engine
def test_trainings_that_ended_in_the_middle_of_a_step_are_freed_by_the_next_one(
    engine: str, last: Callable[[Any], None]
) -> None:
    model, training = start(engine)
    train(training, 1)
    last(training)
    parts = (model, *model.parameters(), training[0], training[1], training[1].guard)
    references = [weakref.ref(part) for part in parts]
    del model, training, parts
    kept = start(engine)
    gc.collect()
    assert [r() for r in references] == [None] * len(references)
    train(kept[1], 1)


def test_another_optimizer_does_not_get_slower_with_the_number_of_trainings() -> None:
    before = other_step()
    kept = [start("bookkeeping") for _ in range(20)]
    assert len(WATCHED) >= 20 * 2
    assert other_step() < 3 * before + 5e-6
    for _, training in kept[::9]:
        train(training, 1)


def test_a_parameter_with_the_id_of_one_that_is_gone_is_no_longer_watched() -> None:
    model, training = start("bookkeeping")
    check = training[1].guard.others
    training[0].cleanup()
    watched = {key for key, checks in WATCHED.items() if any(check() is not None for check in checks)}
    assert not watched & {id(p) for p in model.parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    training[1].original_optimizer.step()
    other = nn.Parameter(torch.zeros(2))
    WATCHED[id(other)] = (weakref.ref(check),)
    check._trained[id(other)] = weakref.ref(next(model.parameters()))
    torch.optim.SGD([other], lr=0.1).step()
    del WATCHED[id(other)]


class Noises:
    """A training whose noise is looked at: no sample moves it."""

    def __init__(self, **options: Any) -> None:
        model = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.5), nn.Linear(16, 3))
        self.training = dpfix.make_private_safe(**setting(model, optimizer=sgd(model, 0.0), **options))
        self.seen: list[Tensor] = []

    def steps(self, number: int) -> None:
        model, optimizer, loader = self.training
        while len(self.seen) < number:
            for x, y in loader:
                optimizer.zero_grad()
                (nn.functional.cross_entropy(model(x), y) * 0).backward()
                optimizer.step()
                self.seen.append(torch.cat([p.grad.flatten() for p in model.parameters()]))


def run_beside(act: Any, wait: float = 0.02) -> tuple[threading.Event, threading.Thread, list[BaseException]]:
    over, failed = threading.Event(), list[BaseException]()

    def loop() -> None:
        try:
            while not over.wait(wait):
                act()
        except BaseException as error:  # shown by the test
            failed.append(error)
            raise

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    return over, thread, failed


@pytest.mark.parametrize("given", [False, True], ids=["own generator", "the script's generator"])
def test_noise_never_repeats_while_another_thread_makes_trainings(given: bool) -> None:
    options = {"noise_generator": torch.Generator().manual_seed(1)} if given else {}
    with warnings.catch_warnings(action="ignore"):
        noises = Noises(**options)
        over, thread, failed = run_beside(
            lambda: dpfix.make_private_safe(**setting(mlp(), grad_sample_mode="bookkeeping"))
        )
        noises.steps(30)
        over.set()
        thread.join(60)
    assert not thread.is_alive() and not failed
    everything = torch.stack(noises.seen)
    assert len(torch.unique(everything[:, 0])) == len(everything), "a number came twice"
    correlation = torch.corrcoef(everything) - torch.eye(len(everything))
    assert float(correlation.abs().max()) < 0.7


def test_two_trainings_in_two_threads() -> None:
    with warnings.catch_warnings(action="ignore"):
        one, two = Noises(), Noises()
        thread = threading.Thread(target=lambda: two.steps(60))
        thread.start()
        one.steps(60)
        thread.join(60)
    assert len(one.seen) >= 60 and len(two.seen) >= 60
    everything = torch.stack([*one.seen, *two.seen])
    assert len(torch.unique(everything[:, 0])) == len(everything)


@pytest.mark.parametrize("told", [True, False], ids=["told", "followed"])
def test_a_model_that_draws_is_checked_while_another_thread_draws(told: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is repeated with the samples exchanged; numbers that another thread draws meanwhile are no samples'."""
    model = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.5), nn.Linear(16, 3))
    monkeypatch.setattr(Agenda, "due", lambda agenda, seen: True)
    options = {} if told else {"criterion": None}
    with warnings.catch_warnings(action="ignore"):
        over, thread, failed = run_beside(lambda: torch.rand(1), wait=0)
        training = dpfix.make_private_safe(**setting(model, **options))
        train(training, 40)
        over.set()
        thread.join(60)
    assert not thread.is_alive() and not failed


def test_a_step_waits_for_a_call_of_another_thread() -> None:
    """Calls and steps share torch's global generators: one comes after the other."""
    _, training = start("bookkeeping")
    inside, go_on, order = threading.Event(), threading.Event(), list[str]()

    def step_of(model: nn.Module, batch: Any) -> Tensor:
        inside.set()
        go_on.wait(30)
        order.append("call")
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def call() -> None:
        with warnings.catch_warnings(action="ignore"):
            dpfix.make_private_safe(**setting(mlp(), criterion=None, training_step=step_of))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    assert inside.wait(30)
    threading.Timer(0.3, go_on.set).start()
    train(training, 1)
    order.append("step")
    thread.join(60)
    assert len(order) > 2 and order.index("step") == len(order) - 1

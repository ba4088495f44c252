"""A budget in a file at untimely moments: threads in each other's way, stopped writers, ends of processes, changed optimizers."""

from __future__ import annotations

import json
import multiprocessing
import threading
from pathlib import Path
from typing import Any

import pytest
from opacus.optimizers import DPOptimizer

import dpfix
from dpfix.training import spender
from tests.helpers import train
from tests.training.test_budget import DELTA, RATE, begin, budget_of, end, epsilon_of, steps_in, until_refused, written
from tests.training.test_budget_processes import answer, held, start


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "data.budget.json"


def test_a_block_is_not_taken_while_another_thread_uses_it(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    budget = budget_of(file, 3.0)
    slow, quick = begin(budget), begin(budget)
    train(slow, 1)
    its = slow[1].guard.guarded.accounting.spender
    in_it, others_done, left = threading.Event(), threading.Event(), spender.Spender._left

    def waiting(self: Any, setting: tuple[float, float]) -> int:
        found = left(self, setting)
        if self is its and found and not in_it.is_set():
            in_it.set()
            others_done.wait(1)
        return found

    monkeypatch.setattr(spender.Spender, "_left", waiting)
    thread = threading.Thread(target=its.release, args=((1.0, RATE),))
    thread.start()
    assert in_it.wait(10)
    until_refused(quick)
    others_done.set()
    thread.join(10)
    in_file = json.loads(file.read_text())["trainings"][its.name]
    ahead = 0 if its._ahead is None else its._ahead[-1]
    assert sum(its._used.values()) + ahead <= steps_in(in_file)


@pytest.mark.parametrize("what", ["lock removed", "moved and linked"])
def test_a_writer_that_is_stopped_keeps_others_out(file: Path, what: str) -> None:
    dpfix.Budget(file, epsilon=1e3, delta=DELTA)
    stopped, other = answer(start("stopped", str(file), what))
    assert stopped > 2 * spender.AHEAD, "it goes on when it is woken"
    assert other == 0, "it waits for the stopped one, in vain"
    assert held(file) == [stopped]


@pytest.mark.parametrize("what", ["moved", "moved late"])
def test_a_writer_whose_file_was_moved_while_it_was_stopped_releases_nothing_more(file: Path, what: str) -> None:
    dpfix.Budget(file, epsilon=1e3, delta=DELTA)
    stopped, other = answer(start("stopped", str(file), what))
    assert stopped == 2 * spender.AHEAD and other == 0 and not file.exists()
    assert held(file.with_name("moved.json")) == [2 * spender.AHEAD]


@pytest.mark.parametrize("warnings", ["default", "error::dpfix.DPFixWarning"])
def test_what_cannot_be_given_back_at_the_end_of_the_process_is_said(file: Path, warnings: str) -> None:
    dpfix.Budget(file, epsilon=1e3, delta=DELTA)
    process = start("gone_at_end", str(file), warnings=warnings)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 3
    assert err.count("stays spent") == 1 and "data.budget.json is gone" in err and "Traceback" not in err


@pytest.mark.parametrize("budgets", [True, False])
def test_another_add_noise_does_not_go_past_the_budget(file: Path, budgets: bool) -> None:
    training = begin(budget_of(file, 3.0) if budgets else None)
    model, optimizer, _ = training
    optimizer.add_noise = lambda: DPOptimizer.add_noise(optimizer)
    if not budgets:
        train(training, 3)
        assert training.get_epsilon(DELTA) == pytest.approx(epsilon_of((1.0, RATE, 3)), rel=1e-2)
        return
    until_refused(training)
    assert all(p.grad is None and p.summed_grad is None for p in model.parameters())
    end(training)
    steps = steps_in(written(file)[0])
    assert epsilon_of((1.0, RATE, steps)) <= 3.0 < epsilon_of((1.0, RATE, steps + 1))


def test_a_child_of_multiprocessing_gives_back(file: Path) -> None:
    training = begin(budget_of(file, 1e3))
    train(training, 1)
    process = multiprocessing.get_context("fork").Process(target=train, args=(training, 2))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    end(training)
    assert [steps_in(line) for line in written(file)] == [1, 2]

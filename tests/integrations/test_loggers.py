"""Epsilon reaches loggers of every kind, and a progress bar without slowing the loop."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

import dpfix
from dpfix.integrations.loggers import log_epsilon
from dpfix.training.progress import Progress
from tests.helpers import setting, train


@pytest.fixture(scope="module")
def private() -> dpfix.PrivateTraining:
    private = dpfix.make_private_safe(**setting(nn.Sequential(nn.Linear(6, 3))))
    train(private, 2)
    return private


def loggers(seen: list[tuple[dict[str, float], int]]) -> dict[str, Any]:
    def take(metrics: dict[str, float], step: int) -> None:
        seen.append((dict(metrics), step))

    return {
        "tensorboard": SimpleNamespace(add_scalar=lambda name, value, step: take({name: value}, step)),
        "wandb": SimpleNamespace(log=take),
        "mlflow": SimpleNamespace(log_metrics=take),
        "a function": take,
    }


@pytest.mark.parametrize("kind", ["tensorboard", "wandb", "mlflow", "a function"])
@pytest.mark.parametrize("step", [None, 70])
def test_epsilon_is_logged(private: dpfix.PrivateTraining, kind: str, step: int | None) -> None:
    seen: list[tuple[dict[str, float], int]] = []
    metrics = log_epsilon(private, loggers(seen)[kind], delta=0.01, step=step, prefix="privacy/")
    written = {name: value for part, _ in seen for name, value in part.items()}
    made = private.statement(0.01).steps
    wanted = {"privacy/epsilon": private.get_epsilon(0.01), "privacy/delta": 0.01, "privacy/private_steps": made}
    assert written == metrics == wanted
    assert {at for _, at in seen} == {made if step is None else step}


def test_what_is_no_logger_is_refused(private: dpfix.PrivateTraining) -> None:
    with pytest.raises(dpfix.ArgumentError, match="is no logger"):
        log_epsilon(private, 3, delta=0.01)


def test_progress_is_epsilon_with_its_delta_and_step(private: dpfix.PrivateTraining) -> None:
    shown = private.progress(0.01)
    assert shown == {
        "epsilon": f"{private.get_epsilon(0.01):.3g} (delta 0.01)",
        "steps": str(private.statement(0.01).steps),
    }


def test_progress_goes_on_and_asks_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("dpfix.training.progress.time.perf_counter", lambda: now[0])
    asked = []

    def ask() -> tuple[int, float]:
        now[0] += 0.5
        asked.append(now[0])
        return len(asked), float(len(asked))

    progress = Progress(1e-5, ask)
    for _ in range(1000):
        progress.now()
        now[0] += 0.1
    assert progress.now() == (len(asked), float(len(asked)))
    assert 2 <= len(asked) <= math.ceil(1000 * 0.1 * 0.01 / 0.5) + 1


def test_progress_of_another_delta_is_not_mixed_up(private: dpfix.PrivateTraining) -> None:
    assert private.progress(0.01)["epsilon"] != private.progress(0.001)["epsilon"]

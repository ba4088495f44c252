"""Epsilon reaches loggers of every kind, and a progress bar without slowing the loop."""

from __future__ import annotations

import math
from pathlib import Path
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


def loggers(seen: list[tuple[dict[str, float], int | None]]) -> dict[str, Any]:
    def take(metrics: dict[str, float], step: int | None) -> None:
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
    seen: list[tuple[dict[str, float], int | None]] = []
    metrics = log_epsilon(private, loggers(seen)[kind], delta=0.01, step=step, prefix="privacy/")
    written = {name: value for part, _ in seen for name, value in part.items()}
    made = private.statement(0.01).steps
    wanted = {"privacy/epsilon": private.get_epsilon(0.01), "privacy/delta": 0.01, "privacy/private_steps": made}
    assert written == metrics == wanted
    assert {at for _, at in seen} == {step if step is not None or kind == "wandb" else made}


def test_the_real_tensorboard(private: dpfix.PrivateTraining, tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        log_epsilon(private, writer, delta=0.01, prefix="privacy/")
    written = events.EventAccumulator(str(tmp_path))
    written.Reload()
    (at,) = written.Scalars("privacy/epsilon")
    assert (at.step, at.value) == (private.statement(0.01).steps, pytest.approx(private.get_epsilon(0.01)))


@pytest.mark.slow  # its database is made anew
@pytest.mark.filterwarnings("default")
def test_the_real_mlflow(private: dpfix.PrivateTraining, tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = mlflow.create_experiment("private", (tmp_path / "files").as_uri())
    with mlflow.start_run(experiment_id=experiment) as run:
        log_epsilon(private, mlflow, delta=0.01)
    (at,) = mlflow.MlflowClient().get_metric_history(run.info.run_id, "epsilon")
    assert (at.step, at.value) == (private.statement(0.01).steps, pytest.approx(private.get_epsilon(0.01)))


@pytest.mark.slow  # it starts a process
@pytest.mark.filterwarnings("default")
def test_the_real_wandb(private: dpfix.PrivateTraining, tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    with wandb.init(project="private", dir=tmp_path, mode="offline") as run:
        for number in range(10):  # more logs than private steps
            run.log({"loss": number})
        log_epsilon(private, run, delta=0.01)
        assert run.summary["epsilon"] == pytest.approx(private.get_epsilon(0.01))


@pytest.mark.parametrize("kind", ["TensorBoardLogger", "CSVLogger"])
def test_real_loggers_of_lightning(private: dpfix.PrivateTraining, tmp_path: Path, kind: str) -> None:
    loggers = pytest.importorskip("lightning.pytorch.loggers")
    if kind == "TensorBoardLogger":
        pytest.importorskip("tensorboard")
    logger = getattr(loggers, kind)(tmp_path)
    log_epsilon(private, logger, delta=0.01)
    logger.save()
    logger.finalize("success")
    assert [file for file in Path(logger.log_dir).iterdir() if file.suffix == ".csv" or "tfevents" in file.name]


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

"""Epsilon where people look: TensorBoard, Weights & Biases, MLflow, or any function; none of them is imported here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dpfix.errors import ArgumentError
from dpfix.scan.values import shown
from dpfix.training.result import PrivateTraining


def log_epsilon(
    private: PrivateTraining, to: Any, *, delta: float, step: int | None = None, prefix: str = ""
) -> dict[str, float]:
    """Write epsilon, delta and the number of private steps to a logger.

    It takes as long as :meth:`PrivateTraining.get_epsilon`: once an epoch rather than on every step.

    Args:
        private: the training.
        to: a ``SummaryWriter``; ``wandb`` or a run of it; ``mlflow``; a logger of Lightning; or a function of metrics and step.
        delta: see :meth:`PrivateTraining.get_epsilon`.
        step: what stands on the axis; if not given, the number of private steps, and in Weights & Biases, which ignores what
            comes after a later step, its own step.
        prefix: in front of the names, for example ``"privacy/"``.

    Returns:
        The metrics.

    Raises:
        ArgumentError: ``to`` is no logger.
    """
    write = _writer(to, step)
    statement = private.statement(delta)
    metrics = {"epsilon": statement.epsilon, "delta": statement.delta, "private_steps": float(statement.steps)}
    named = {f"{prefix}{name}": value for name, value in metrics.items()}
    write(named, statement.steps if step is None else step)
    return named


def _writer(to: Any, asked: int | None) -> Callable[[Mapping[str, float], int], Any]:
    """How metrics are written to a logger, by what it can; ``asked`` is the step that the caller asked for."""
    if hasattr(to, "add_scalar"):  # TensorBoard

        def one_by_one(metrics: Mapping[str, float], step: int) -> None:
            for name, value in metrics.items():
                to.add_scalar(name, value, step)

        return one_by_one
    if hasattr(to, "log_metrics"):  # MLflow, and loggers of Lightning
        return lambda metrics, step: to.log_metrics(dict(metrics), step=step)
    if hasattr(to, "log"):  # Weights & Biases
        return lambda metrics, step: to.log(dict(metrics), step=asked)
    if callable(to):
        return to
    raise ArgumentError(
        f"to={shown(to)} is no logger: it has neither add_scalar, log_metrics nor log, and cannot be called.",
        help="Pass a SummaryWriter, wandb or its run, mlflow, or a function of metrics and step.",
        path="to",
    )

"""What a budget asks for, before anything is trained: no data is touched, only numbers that are public."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import cycle
from pathlib import Path
from typing import Any

from dpfix.errors import ArgumentError
from dpfix.report.report import EngineEvidence, Report
from dpfix.report.units import size as in_words
from dpfix.sampling.rate import BY_CHANCE, accounted_compositions
from dpfix.scan.arguments import check_budget, check_choice, check_delta
from dpfix.scan.options import SAMPLINGS
from dpfix.scan.values import number, number_in, plain, shown
from dpfix.training.epsilon import Accuracy, Entry, answer
from dpfix.training.noise_search import Target, noise_for
from dpfix.training.pld_accountant import new_accountant

POINTS = 12
"""Of a curve in the picture."""


@dataclass(frozen=True)
class PlannedTraining:
    """One way to spend a budget.

    Attributes:
        batch_size: expected number of samples in a batch.
        sampling_rate: probability with which a sample enters a batch.
        steps: optimizer steps in all.
        noise_multiplier: standard deviation of the noise as a multiple of the clip norm.
        epsilon: what is spent at the end.
        entry: what the accountant counts: noise, rate, number of releases.
        seconds: expected time of all steps; ``None`` before :meth:`TrainingPlans.timed`.
        memory: bytes that the tensors of a step are expected to hold beside the model, if the whole batch is in memory at once;
            ``None`` where it was not measured.
    """

    batch_size: int
    sampling_rate: float
    steps: int
    noise_multiplier: float
    epsilon: float
    entry: Entry
    seconds: float | None = None
    memory: float | None = None

    @property
    def noise_to_batch(self) -> float:
        """Standard deviation of the noise in a coordinate of the mean gradient, as a multiple of the clip norm.

        The ratio that decides how useful a step is: a coordinate of the mean of clipped gradients is at most 1.
        """
        return self.noise_multiplier / self.batch_size


@dataclass(frozen=True)
class TrainingPlans:
    """Ways to spend a budget, one for each batch size; printed, they are a table.

    Attributes:
        samples: number of samples.
        epochs: passes over them.
        target_epsilon: the budget.
        target_delta: its delta.
        sampling: how batches are drawn.
        rows: the plans.
    """

    samples: int
    epochs: float
    target_epsilon: float
    target_delta: float
    sampling: str
    rows: tuple[PlannedTraining, ...]

    def __str__(self) -> str:
        timed, held = (any(getattr(row, of) is not None for row in self.rows) for of in ("seconds", "memory"))
        lines = [
            f"{self.samples} samples, {self.epochs:g} epochs, epsilon {self.target_epsilon:g} at delta {self.target_delta:g}, "
            f"sampling {self.sampling!r}",
            f"{'batch size':>10s} {'rate':>10s} {'steps':>8s} {'noise':>8s} {'noise/batch':>12s} {'epsilon':>8s}"
            + f" {'time':>9s}" * timed
            + f" {'memory':>9s}" * held,
        ]
        lines += [
            f"{r.batch_size:10d} {r.sampling_rate:10.3g} {r.steps:8d} {r.noise_multiplier:8.3f} {r.noise_to_batch:12.3g} "
            f"{r.epsilon:8.3f}"
            + ("" if r.seconds is None else f" {_duration(r.seconds):>9s}")
            + ("" if r.memory is None else f" {in_words(r.memory):>9s}")
            for r in self.rows
        ]
        if self.target_delta >= 1 / self.samples:
            lines.append(f"delta is not below 1 / samples = {1 / self.samples:.2g}; such a bound means little")
        return "\n".join(lines)

    def timed(self, timing: Report | float) -> TrainingPlans:
        """The same plans with the time and the memory that they take on this machine.

        What is counted is the work of the engine, forward to clipped sum, for every sample in turn. Loading the data, noise, the
        optimizer and the checks of real steps come on top. Memory is that of the tensors of one step on the whole batch, beside
        the model and the optimizer's state: a straight line through two batch sizes at which the engine was measured.
        ``max_physical_batch_size=`` of the call bounds it.

        Args:
            timing: the report of :func:`dpfix.diagnose` or of a private training of the model, in which engines were timed on a
                probe without the values of the data; or seconds per sample.

        Returns:
            Plans whose rows have ``seconds``, and ``memory`` where a report has measured it.

        Raises:
            ArgumentError: no engine was timed, or the number is not positive.
        """
        timed = _timed_engine(timing)
        each: Any = timing if timed is None else (timed.seconds or math.nan) / timed.samples

        def measured(row: PlannedTraining) -> PlannedTraining:
            memory = None
            if timed is not None and timed.memory is not None and timed.memory_per_sample is not None:
                memory = max(0.0, timed.memory + timed.memory_per_sample * (row.batch_size - timed.samples))
            return replace(row, seconds=row.steps * row.batch_size * each, memory=memory)

        return replace(self, rows=tuple(map(measured, self.rows)))

    def picture(self, path: str | Path) -> None:
        """Draw epsilon over steps for every batch size, and the noise-to-batch ratio over the batch size.

        Args:
            path: file to write; its ending says the format.

        Raises:
            ArgumentError: matplotlib is not installed.
        """
        try:
            figures: Any = import_module("matplotlib.figure")
        except ImportError as error:
            raise ArgumentError(
                "picture() needs matplotlib, which is not installed.", help="pip install 'dpfix[report]'.", path="path"
            ) from error
        figure = figures.Figure(figsize=(9, 3.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        for row, line in zip(self.rows, cycle(("-", "--", ":", "-."))):  # told apart without colour
            left.plot(*self._curve(row), line, label=f"batch size {row.batch_size}")
        left.set(xlabel="steps", ylabel="epsilon")
        left.legend()
        right.plot([r.batch_size for r in self.rows], [r.noise_to_batch for r in self.rows], "o-")
        right.set(xlabel="batch size", ylabel="noise / batch size", xscale="log", yscale="log")
        figure.savefig(path, dpi=120, metadata={"Software": None} if str(path).endswith(".png") else None)

    def _curve(self, row: PlannedTraining) -> tuple[list[float], list[float]]:
        noise, rate, releases = row.entry
        parts = sorted({math.ceil(releases * k / POINTS) for k in range(1, POINTS + 1)})
        epsilons = [_epsilon((noise, rate, part), self.target_delta) for part in parts]
        return [0.0, *(row.steps * part / releases for part in parts)], [0.0, *epsilons]


def plan(
    *,
    samples: int,
    epochs: float,
    batch_sizes: Iterable[int],
    target_epsilon: float,
    target_delta: float,
    sampling: str = "poisson",
) -> TrainingPlans:
    """What a privacy budget asks for, for several batch sizes, before anything is trained.

    Only these numbers are used; no data, no model. Larger batches need more noise, and less noise for each of their samples.

    Args:
        samples: number of samples that are drawn from.
        epochs: number of passes over them.
        batch_sizes: expected batch sizes to compare.
        target_epsilon: the budget after ``epochs`` epochs.
        target_delta: its delta; smaller than 1 / samples.
        sampling: how batches are drawn; see :func:`dpfix.make_private_safe`.

    Returns:
        A plan for every batch size. ``print`` shows a table, ``picture(path)`` draws it.

    Raises:
        ArgumentError: a number cannot be used, or the budget cannot be reached.

    >>> plans = plan(samples=10_000, epochs=5, batch_sizes=[100, 1000], target_epsilon=3.0, target_delta=1e-5)
    >>> [row.steps for row in plans.rows]
    [500, 50]
    """
    population = _whole("samples", samples, 1, None)
    (epsilon, passes), delta = check_budget(target_epsilon, epochs), check_delta(target_delta)
    check_choice("sampling", sampling, SAMPLINGS)
    given = plain(batch_sizes)
    sizes = list(given) if isinstance(given, Iterable) and not isinstance(given, (str, bytes)) else []
    if not sizes:
        raise ArgumentError(
            f"batch_sizes={shown(batch_sizes)} names no batch size.", help="Pass for example batch_sizes=[64, 256, 1024].",
            path="batch_sizes",
        )  # fmt: skip
    rows = []
    for batch in [_whole("batch_sizes", size, 1, population) for size in sizes]:
        rate, batches = batch / population, math.ceil(population / batch)
        releases = accounted_compositions(batches, sampling, passes)
        budget = Target(epsilon, delta, rate if sampling in BY_CHANCE else 1.0, releases)
        noise = noise_for(budget, new_accountant("prv"))
        entry = noise, budget.sample_rate, releases
        rows.append(PlannedTraining(batch, rate, math.ceil(passes * batches), noise, _epsilon(entry, delta), entry))
    return TrainingPlans(population, passes, epsilon, delta, sampling, tuple(rows))


def _timed_engine(timing: Any) -> EngineEvidence | None:
    """What a report says of its engine's step; ``None`` where a number of seconds was given."""
    if not isinstance(timing, Report):
        number_in("timing", timing, (0, math.inf), "Pass a report, or seconds per sample.", open_at="low")
        return None
    for tried in timing.evidence:
        if tried.engine == timing.engine and tried.seconds and tried.samples:
            return tried
    raise ArgumentError(
        f"timing: the report of {timing.model} has no time of its engine ({timing.engine or 'not chosen yet'}).",
        "Engines are timed where several are right.",
        "Measure a few steps, and pass seconds per sample.",
        path="timing",
    )


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.3g} min" if seconds < 3600 else f"{seconds / 3600:.3g} h"


def _epsilon(entry: Entry, delta: float) -> float:
    accountant = new_accountant("prv")
    accountant.history = [entry]
    return answer(accountant, delta, Accuracy())[0].epsilon


def _whole(name: str, value: Any, low: int, high: int | None) -> int:
    found = number(value)
    if found is None or found != int(found) or found < low or (high is not None and found > high):
        raise ArgumentError(
            f"{name}: {shown(value)} is not a whole number from {low}{'' if high is None else f' to samples={high}'}.",
            "The sampling rate is batch size over the number of samples.",
            "Pass for example samples=10000, batch_sizes=[64, 256, 1024].",
            path=name,
        )
    return int(found)

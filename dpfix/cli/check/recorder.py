"""In the process of a checked script: what its private training does, step by step, and how that differs from another run.

From the second run on, every release is replaced with that of the first run, and the random numbers go on from where they were
there. So each step is compared given the same releases before it, which is what the sensitivity of a step is about; whatever
the script computes from releases is the same in all runs.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader

import dpfix.api
from dpfix.cli.check.neighbour import Neighbour
from dpfix.cli.check.run import Job, Located, Step, Told
from dpfix.errors import DPFixWarning
from dpfix.instrument.rng import GeneratorStates
from dpfix.report.finding import Finding, Severity
from dpfix.report.report import Report
from dpfix.sampling.own_loader import Deliveries
from dpfix.sampling.people import unit_of
from dpfix.sampling.randomness import Randomness, Stream
from dpfix.sampling.rate import accounted_rate, batch_size, index_set, sampling_of
from dpfix.training.result import PrivateTraining
from dpfix.training.step_guard import StepGuard

MOST_DRAWS = 1000
"""Draws that are remembered."""

ALIKE = 1e-4
"""Part of a parameter's size by which rounding may change it."""


class Recorder:
    """Watches the private training of this process.

    Args:
        job: what is to be done.
        told: what is written down.
    """

    def __init__(self, job: Job, told: Told) -> None:
        self.job, self.told = job, told
        self.change = job.change
        self._folder, self._base = Path(job.folder), Path(job.base) if job.base else None
        self._training: PrivateTraining | None = None
        self._report: Report | None = None
        self._dataset: Any = None
        self._indices: list[int] = []
        self._beside: WeakSet[Optimizer] = WeakSet()
        self._since, self._sums = time.perf_counter(), list[torch.Tensor]()
        self._line = ("", 0)

    def put_in(self) -> None:
        """Watch from now on; nothing is taken out again, since the process ends with the script."""
        api: Any = dpfix.api
        api.hand_off = self._handing_off(api.hand_off)
        api.PrivateTraining = self._made
        api._engine = self._with_place(api._engine)
        guard: Any = StepGuard
        guard.before_noise, guard.noised = self._before(guard.before_noise), self._after(guard.noised)
        loader: Any = DataLoader
        loader._get_iterator = self._reading(loader._get_iterator)
        deliveries: Any = Deliveries
        deliveries.counted = self._counting(deliveries.counted)
        register_optimizer_step_post_hook(self._stepped)
        warnings.showwarning = self._warned

    # ------------------------------------------------------------------ the call

    def _with_place(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def engine(*args: Any) -> Any:
            self._line = self.place_of(sys._getframe(1))
            return original(*args)

        return engine

    def _handing_off(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def hand_off(make_private: Any, engine: Any, originals: Any, decided: Any, **more: Any) -> Any:
            known: Randomness = decided.randomness
            alike = Randomness(Stream((0, 0)), Stream((0, 1)), known.seed)
            self._dataset = originals.data_loader.dataset
            self._indices = index_set(originals.data_loader)
            self.told.training["seed"] = known.seed is not None
            made = original(make_private, engine, originals, replace(decided, randomness=alike, spender=None), **more)
            ledger = made[1].guard.guarded.ledger
            if ledger is not None:
                ledger.delivered_of = self._drew
            return made

        return hand_off

    def _made(self, items: Any, report: Report, engine: Any) -> PrivateTraining:
        self._training = PrivateTraining(items, report, engine)
        _, optimizer, loader = self._training[:3]
        sampling = sampling_of(loader)
        self.told.training |= {
            "place": self._line,
            "model": report.model,
            "parameters": sum(p.numel() for p in optimizer.params),
            "optimizer": type(optimizer.original_optimizer).__name__,
            "samples": len(self._indices),
            "unit": unit_of(loader),
            "batch_size": batch_size(loader),
            "batches": len(loader),
            "workers": loader.num_workers,
            "sampling": sampling,
            "rate": accounted_rate(loader, sampling),
            "noise_multiplier": float(optimizer.noise_multiplier),
            "max_grad_norm": optimizer.max_grad_norm,
        }
        self.look_at_report()
        self.told.write(self._folder)  # a script that is killed in its first step has told what the call found
        self._since = time.perf_counter()
        return self._training

    def look_at_report(self) -> None:
        """Write down the report as it is now."""
        if self._training is None:
            return
        report = self._training.report
        if report == self._report:
            return
        self._report = report
        self.told.training["engine"] = report.engine
        self.told.report = asdict(report)
        known = [one.finding for one in self.told.located]
        self.told.located += [Located(f, *self._line) for f in report.findings if f not in known]

    def place_of(self, frame: Any) -> tuple[str, int]:
        """The innermost line of the script's own files that led to a frame."""
        while frame is not None:
            file = self.job.original(frame.f_code.co_filename)
            if file:
                return file, frame.f_lineno
            frame = frame.f_back
        return "", 0

    def _warned(
        self, message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None
    ) -> None:
        if issubclass(category, DPFixWarning):
            found = Finding.advice("DPF048", str(message), "dpfix warned about it while the script ran.")
            file = self.job.original(filename)
            place = (file, lineno) if file else self.place_of(sys._getframe(1))
            self.told.located.append(Located(replace(found, severity=Severity.BLOCKS_TRAINING), *place))
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))

    # ------------------------------------------------------------------ what is read

    def _drew(self, indices: list[int]) -> int:
        if len(self.told.drawn) < MOST_DRAWS:
            self.told.drawn.append(list(indices))
        return len(indices) if self.change is None else self.change.delivered_of(indices)

    def _counting(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def counted(deliveries: Deliveries, indices: Any) -> None:
            if isinstance(indices, (list, tuple)):
                self._drew([int(i) for i in indices])
            original(deliveries, indices)

        return counted

    def _reading(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Loaders of the private training's data set, whosever they are, read the neighbouring one."""

        def get_iterator(loader: Any) -> Any:
            dataset = vars(loader).get("dataset")
            if self.change is None or self._dataset is None or dataset is not self._dataset:
                return original(loader)
            vars(loader)["dataset"] = Neighbour(dataset, self.change)
            try:
                return original(loader)
            finally:
                vars(loader)["dataset"] = dataset

        return get_iterator

    def _stepped(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        private = None if self._training is None else self._training[1]
        if private is not None and optimizer not in (private, private.original_optimizer):
            self._beside.add(optimizer)

    # ------------------------------------------------------------------ the steps

    def _before(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def before_noise(guard: StepGuard, optimizer: Any) -> None:
            self._sums = [p.summed_grad.detach().cpu().clone() for p in optimizer.params]
            original(guard, optimizer)

        return before_noise

    def _after(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def noised(guard: Any, optimizer: Any) -> None:
            due = guard._noise_due
            original(guard, optimizer)
            if due:
                self._released(guard, optimizer)

        return noised

    def _released(self, guard: StepGuard, optimizer: Any) -> None:
        now, number, states = time.perf_counter(), len(self.told.steps), GeneratorStates.now()
        draw = guard.guarded.progress.draw
        samples = 0 if draw is None else draw.whole.samples
        step = Step(now - self._since, samples, times=guard.guarded.accounting.times(optimizer))
        here = {
            "sums": self._sums,
            "releases": [p.grad.detach().cpu().clone() for p in optimizer.params],
            "generators": states.as_plain_values(),
            "beside": self._parameters_beside(),
        }
        file = f"{number}.pt"
        if self._base is None:
            torch.save(here, self._folder / file)
        elif (self._base / file).exists():
            there = torch.load(self._base / file)
            self._compare(step, here, there, optimizer)
            for p, released in zip(optimizer.params, there["releases"], strict=True):
                p.grad.copy_(released)
            GeneratorStates.from_plain_values(there["generators"]).put_back()
        else:
            step.alike = False  # the first run did not come as far
        self.told.steps.append(step)
        self.look_at_report()
        if number + 1 >= self.job.steps:
            self.end("enough")
        self.told.write(self._folder)
        self._since = time.perf_counter()

    def _compare(self, step: Step, here: dict[str, Any], there: dict[str, Any], optimizer: Any) -> None:
        squares = (
            (mine.double() - theirs.double()).square().sum()
            for mine, theirs in zip(here["sums"], there["sums"], strict=True)
        )
        norm = float(optimizer.max_grad_norm)
        step.change = float(sum(squares, torch.zeros((), dtype=torch.float64)).sqrt()) / norm if norm else 0.0
        step.alike = _same(here["generators"], there["generators"])
        for name, parameters in here["beside"].items():
            others = there["beside"].get(name, [])
            for mine, theirs in zip(parameters, others, strict=False):
                far = (mine.double() - theirs.double()).norm() > ALIKE * theirs.double().norm()
                if mine.shape == theirs.shape and far and name not in step.beside:
                    step.beside.append(name)

    def _parameters_beside(self) -> dict[str, list[torch.Tensor]]:
        names = sorted(self._beside, key=lambda o: (type(o).__name__, [tuple(p.shape) for p in _parameters(o)]))
        return {
            f"{type(o).__name__} {number + 1}": [p.detach().cpu().clone() for p in _parameters(o)]
            for number, o in enumerate(names)
        }

    def end(self, status: str) -> None:
        """Write everything down and end the process at once: the rest of the script is not run."""
        told = self.told
        told.status, told.memory = status, _largest_memory()
        drawn = {index for draw in told.drawn for index in draw}
        told.others = [index for index in self._indices if index not in drawn][:100] or self._indices[:100]
        told.write(self._folder)
        sys.stdout.flush()
        sys.stderr.flush()
        _end_workers()
        os._exit(0)


def _end_workers() -> None:
    import multiprocessing

    for worker in multiprocessing.active_children():
        worker.terminate()


def _parameters(optimizer: Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _same(mine: Any, theirs: Any) -> bool:
    if isinstance(mine, torch.Tensor):
        return torch.equal(mine, theirs)
    if isinstance(mine, dict):
        return all(_same(mine[key], theirs[key]) for key in mine)
    if isinstance(mine, (list, tuple)):
        return len(mine) == len(theirs) and all(map(_same, mine, theirs))
    return mine == theirs


def _largest_memory() -> int:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # not on this system
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

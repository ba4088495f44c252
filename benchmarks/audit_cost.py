"""What the proofs before training and the guards while training cost.

``python -m benchmarks.audit_cost [--only TEXT] [--rounds 7] [--write docs/checks.md]``

For a few models, everything in CPU time of the process:

* the whole ``make_private_safe`` call, and of it what looks and proves (the record of the training step, the isolation,
  the audit of the engine that is chosen, each also on the harder probes), in ordinary, non-private training steps at the
  batch size of the script;
* the largest number of bytes that tensors hold in the call, and in an ordinary step, beside what was there before; the
  difference in models (bytes of all parameters); with the chosen engine alone;
* the guards' share of a private step: what runs before, after and inside ``optimizer.step()`` besides the engine, once the
  noise of the first steps was looked at;
* the share of training time that checks of real steps take, the first steps and the later ones apart.

Engines that are tried and not chosen, and the timing of those that passed, are part of the whole call only.
The exit status is 1 if observing and proving costs more than 12 steps, or the guards more than 2 % of a step.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from monai.losses import DiceCELoss
from monai.networks.nets import VNet
from torch import Tensor, nn
from torch.utils.data import DataLoader

import dpfix
from benchmarks.common import tables
from benchmarks.common.models import CharLSTM, TorchTransformer, classify, cnn, mlp, unet
from benchmarks.common.process import cpu_seconds, most_allocated, quiet
from dpfix import pipeline
from dpfix.audit import harder
from dpfix.choose import select, timing
from dpfix.sampling.ledger import Pass
from dpfix.training.follow.agenda import FIRST
from dpfix.training.guards.noise import AT_ONCE

MOST_STEPS = 12.0
CALLS, SHORT = 5, 1.0
"""Calls of which the median is taken, where one takes less than so many seconds."""
LARGEST_SHARE = 0.02  # half of it for the noise, whose proof benchmarks.noise_cost measures by itself


@dataclass(frozen=True)
class Setup:
    """A script: its model, its samples, the size of its batches and its training step."""

    name: str
    model: Callable[[], nn.Module]
    items: Callable[[int], list[Any]]
    batch_size: int
    loss: Callable[[nn.Module, Any], Tensor]


# ------------------------------------------------------------------ the set-ups


def images(*shape: int, classes: int = 10) -> Callable[[int], list[Any]]:
    return lambda count: [(torch.randn(shape), i % classes) for i in range(count)]


def texts(length: int, words: int, classes: int = 0) -> Callable[[int], list[Any]]:
    def make(count: int) -> list[Any]:
        return [(torch.randint(0, words, (length,)), i % classes if classes else 0) for i in range(count)]

    return make


def volumes(count: int) -> list[Any]:
    return [(torch.randn(1, 32, 32, 32), (torch.rand(1, 32, 32, 32) < 0.1).float()) for _ in range(count)]


def next_word(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0])[:, :-1].flatten(0, 1), batch[0][:, 1:].flatten())


SEGMENTATION = DiceCELoss(sigmoid=True)


def segment(model: nn.Module, batch: Any) -> Tensor:
    return SEGMENTATION(model(batch[0]), batch[1])


SETUPS = (
    Setup("MLP 784-1024-1024-10, B=256", mlp, images(784), 256, classify),
    Setup("CNN 28x28, B=256", cnn, images(1, 28, 28), 256, classify),
    Setup("transformer d=128 x2, T=64, B=16", TorchTransformer, texts(64, 1000), 16, next_word),
    Setup("char LSTM, T=64, B=64", partial(CharLSTM, 60, 32, 64, classes=10), texts(64, 60, 10), 64, classify),
    Setup("MONAI UNet 32^3, B=4", partial(unet, 1, (16, 32, 64, 128)), volumes, 4, segment),
    Setup("MONAI VNet 32^3, B=2", VNet, volumes, 2, segment),
)


# ------------------------------------------------------------------ measuring


class Clock:
    """CPU time spent in some functions, without what they spend in each other."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}
        self._inside: list[list[float]] = []

    @contextmanager
    def watching(self, *places: tuple[Any, str, str]) -> Iterator[Clock]:
        """Time functions while a block runs.

        Args:
            *places: ``(owner, attribute, name under which its time is kept)``.
        """
        before = [(owner, attribute, getattr(owner, attribute)) for owner, attribute, _ in places]
        for (owner, attribute, function), (_, _, name) in zip(before, places, strict=True):
            setattr(owner, attribute, self.timed(function, name))
        try:
            yield self
        finally:
            for owner, attribute, function in before:
                setattr(owner, attribute, function)

    def timed(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """A function whose time is kept.

        Args:
            function: any function.
            name: under which its time is kept.

        Returns:
            A function that does the same.
        """

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            self._inside.append([0.0])
            try:
                return function(*args, **kwargs)
            finally:
                spent = time.process_time() - start
                within = self._inside.pop()[0]
                self.seconds[name] = self.seconds.get(name, 0.0) + spent - within
                self.calls[name] = self.calls.get(name, 0) + 1
                if self._inside:
                    self._inside[-1][0] += spent

        return timed


def ordinary_step(setup: Setup, rounds: int) -> tuple[float, int, int]:
    """Median CPU seconds of a non-private training step, the bytes that it allocates, and those of the model."""
    model = setup.model().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    batch = torch.utils.data.default_collate(setup.items(setup.batch_size))

    def step() -> None:
        optimizer.zero_grad()
        setup.loss(model, batch).backward()
        optimizer.step()

    step()
    seconds = statistics.median(cpu_seconds(step) for _ in range(rounds))
    optimizer.zero_grad()
    return seconds, most_allocated(step), sum(p.nbytes for p in model.parameters())


PROVING = (
    (pipeline, "observe", "observe"),
    (pipeline, "check_inside", "isolate"),
    (pipeline, "check_ordinary", "isolate"),
    (pipeline, "reference", "isolate"),
    (harder, "observe", "observe"),
    (harder, "check_inside", "isolate"),
    (harder, "check_isolation", "isolate"),
    (harder, "decided_by_rounding", "isolate"),
    (harder, "reference", "isolate"),
    (select._Search, "_try", "try"),
    (timing, "in_order", "time"),
    (select, "_confirm", "confirm"),
)


@dataclass(frozen=True)
class Cost:
    """What was measured for one set-up; times in CPU seconds."""

    step: float
    call: float
    observe: float
    isolate: float
    audit: float
    model: int
    step_bytes: int
    call_bytes: int
    engines: int
    engine: str
    private: float
    guards: float
    first_checks: float
    later_checks: float

    @property
    def proofs(self) -> float:
        """Observing and proving, in ordinary steps."""
        return (self.observe + self.isolate + self.audit) / self.step


def ready(setup: Setup, **options: Any) -> Callable[[], dpfix.PrivateTraining]:
    """A ``make_private_safe`` that has only to be called."""
    model = setup.model().train()
    loader: Any = DataLoader(setup.items(2 * setup.batch_size), batch_size=setup.batch_size)  # type: ignore[arg-type]
    return partial(
        dpfix.make_private_safe,
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
        data_loader=loader,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        training_step=setup.loss,
        cache=False,
        **options,
    )


def call(setup: Setup, **options: Any) -> tuple[float, dict[str, float], dpfix.PrivateTraining]:
    """One ``make_private_safe``: its CPU time, that of its parts, and what it returns."""
    work, clock = ready(setup, **options), Clock()
    made: list[dpfix.PrivateTraining] = []
    gc.collect()
    gc.freeze()  # to go through everything that was imported takes Python 0.3 s, in whichever call it happens to be due
    with _confirmed_at_once(), clock.watching(*PROVING):
        seconds = cpu_seconds(lambda: made.append(work()))
    gc.unfreeze()
    return seconds, clock.seconds, made[0]


@contextmanager
def _confirmed_at_once() -> Iterator[None]:
    """The proofs on the harder probes come from a generator; its time would not be that of its call."""
    original = select._confirm
    select._confirm = lambda *args: iter(list(original(*args)))
    try:
        yield
    finally:
        select._confirm = original


def private_step(setup: Setup, training: dpfix.PrivateTraining, rounds: int) -> tuple[float, float]:
    """Median CPU seconds of a private step, and of the guards in it."""
    model, optimizer, _ = training
    total, share = [], []
    guard = optimizer.guard
    handle = guard.guarded.handle
    of_engine = ("collect", "announce", "clip_and_accumulate", "clear", "finish")
    of_guard = ("cleared", "before_step", "clip", "summed", "before_noise", "noised", "after_step")
    engine = [(handle, name, "engine") for name in of_engine if hasattr(handle, name)]
    guarding = [(guard, name, "guards") for name in of_guard if hasattr(guard, name)]
    batch = torch.utils.data.default_collate(setup.items(setup.batch_size))
    for number in range(AT_ONCE + rounds):
        clock = Clock()
        guard.guarded.ledger.start()
        Pass(guard.guarded.ledger, delivers=False).drew(setup.batch_size)
        with clock.watching(*engine, *guarding):

            def step() -> None:
                optimizer.zero_grad()
                setup.loss(model, batch).backward()
                optimizer.step()

            seconds = cpu_seconds(step)
        nothing = clock.timed(lambda: None, "nothing")
        nothing()  # what a look at the clock takes, with the caches as the step has left them
        if number >= AT_ONCE:
            total.append(seconds)
            share.append(clock.seconds["guards"] - clock.calls["guards"] * clock.seconds["nothing"])
    return statistics.median(total), statistics.median(share)


def checking(setup: Setup, training: dpfix.PrivateTraining, rounds: int) -> tuple[float, float]:
    """Wall time of checks in the first steps, and in later ones, as a share of all time of these steps.

    Later steps are chosen too rarely to wait for them: their share is the probability times the time of a check. The
    probability is that after some steps more, since the first ones take longer than those that follow.
    """
    model, optimizer, loader = training
    vars(loader)["batch_sampler"] = _Drawn(setup.batch_size)
    agenda = optimizer.guard.real_steps.agenda
    spent, check = [0.0], agenda.check

    @contextmanager
    def timed() -> Iterator[None]:
        start = time.perf_counter()
        try:
            with check():
                yield
        finally:
            spent[0] += time.perf_counter() - start

    agenda.check = timed

    def seconds(steps: int) -> float:
        start, spent[0] = time.perf_counter(), 0.0
        for batch in islice(loader, steps):
            optimizer.zero_grad()
            setup.loss(model, batch).backward()
            optimizer.step()
        return time.perf_counter() - start

    total = seconds(FIRST)
    first = spent[0] / total
    seconds(rounds)
    chance = agenda.chance
    agenda.due = lambda seen: True
    step = (seconds(rounds) - spent[0]) / rounds
    expected = 2 * chance * spent[0] / rounds  # the step after a chosen one is checked, too
    return first, expected / (step + expected)


class _Drawn:
    """Draws of the nominal size, without end."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            yield list(range(self.size))

    def __len__(self) -> int:
        return 2


def measure(setup: Setup, rounds: int) -> Cost:
    torch.manual_seed(0)
    step, step_bytes, model = ordinary_step(setup, rounds)
    whole, _, first = call(setup)
    chosen = first.plan.engine
    # The same call with the chosen engine alone: what looking and proving cost without the engines that lost.
    repeats = [call(setup, grad_sample_mode=chosen) for _ in range(CALLS if whole < SHORT else 1)]
    _, parts, training = sorted(repeats, key=lambda made: sum(made[1].values()))[len(repeats) // 2]
    call_bytes = most_allocated(ready(setup, grad_sample_mode=chosen))
    proving = parts.get("try", 0.0) + parts.get("confirm", 0.0)
    private, guarding = private_step(setup, training, rounds)
    engines = len(first.report.evidence)
    checks = checking(setup, call(setup, grad_sample_mode=chosen)[2], rounds)
    return Cost(
        step, whole, parts["observe"], parts["isolate"], proving, model, step_bytes, call_bytes, engines, chosen, private,
        guarding, *checks,
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="set-ups whose name contains this text")
    parser.add_argument("--rounds", type=int, default=7, help="steps of which the median is taken")
    parser.add_argument("--write", type=Path, help="page whose table is replaced")
    arguments = parser.parse_args()
    quiet()
    lines = tables.head(
        "model", "step, ms", "whole call, steps", "observe", "isolate", "audit", "observe + isolate + audit, steps",
        "memory of a step and of the call, MB", "difference, models", "engine", "private step / step", "guards, us",
        "guards / private step", "checks of the first steps", "checks of later steps",
    )  # fmt: skip
    print("\n".join(lines))
    worst, largest = 0.0, 0.0
    for setup in SETUPS:
        if arguments.only.lower() not in setup.name.lower():
            continue
        c = measure(setup, arguments.rounds)
        lines.append(
            tables.row(
                setup.name,
                f"{1e3 * c.step:.1f}",
                f"{c.call / c.step:.1f} ({c.engines} engines)",
                f"{c.observe / c.step:.1f}",
                f"{c.isolate / c.step:.1f}",
                f"{c.audit / c.step:.1f}",
                f"{c.proofs:.1f}",
                f"{c.step_bytes / 1e6:.0f}, {c.call_bytes / 1e6:.0f}",
                f"{(c.call_bytes - c.step_bytes) / c.model:.1f}" if c.call_bytes > c.step_bytes else "-",
                c.engine,
                f"{c.private / c.step:.2f}",
                f"{1e6 * c.guards:.0f}",
                f"{c.guards / c.private:.2%}",
                f"{c.first_checks:.0%}",
                f"{c.later_checks:.1%}",
            )
        )
        print(lines[-1], flush=True)
        worst, largest = max(worst, c.proofs), max(largest, c.guards / c.private)
    lines.append(
        f"\nCPU time of the process, one thread, medians of {arguments.rounds} steps, torch {torch.__version__}. "
        f"Largest: {worst:.1f} steps (allowed {MOST_STEPS:g}), guards {largest:.2%} (allowed {LARGEST_SHARE:.0%})."
    )
    print(lines[-1])
    if arguments.write is not None:
        tables.write(arguments.write, lines)
    return int(worst > MOST_STEPS or largest > LARGEST_SHARE)


if __name__ == "__main__":
    sys.exit(main())

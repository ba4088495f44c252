"""Thousands of steps of a few models, many of them with an empty draw: memory, open files, accounting."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import dpfix
from benchmarks.common import tables
from benchmarks.common.models import CharLSTM, TorchTransformer
from benchmarks.common.process import in_a_fresh_process, quiet
from benchmarks.soak.part import Part
from dpfix.sampling.poisson import PoissonSampler
from dpfix.training.accounting import accounted_steps

ITEMS, BATCH = 64, 2
"""Samples, and the expected size of a batch: 13 % of the draws are empty."""
WARM = 1000
"""Steps after which nothing may grow any more."""
LARGEST_GROWTH = 64
"""MiB of resident memory that the steps after those may add: what the allocator keeps, and the fingerprints of the noise, of
which 200,000 are kept (some 200 bytes each with their place in a dictionary), one for each parameter and step."""


def _images(*shape: int) -> list[Any]:
    return [(torch.randn(*shape), i % 10) for i in range(ITEMS)]


def _texts(words: int, length: int) -> list[Any]:
    texts = torch.randint(words, (ITEMS, length + 1))
    return [(text[:-1], text[1:]) for text in texts]


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)
    )  # fmt: skip


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 10))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[Any]]]] = {
    "MLP": (_mlp, lambda: _images(64)),
    "CNN": (_cnn, lambda: _images(1, 28, 28)),
    "char LSTM": (lambda: CharLSTM(40, 16, 32), lambda: _texts(40, 16)),
    "transformer": (lambda: TorchTransformer(32, 1, 50, 16), lambda: _texts(50, 16)),
}


@dataclass(frozen=True)
class Use:
    """Memory in MiB, and open files, of this process."""

    memory: float
    files: int

    @classmethod
    def now(cls) -> Use:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return cls(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir("/proc/self/fd")))


@dataclass(frozen=True)
class Long:
    """What a long training was like.

    Attributes:
        engine: the engine that was chosen.
        draws: draws of the sampler.
        empty: how many of them were empty.
        refused: steps that were refused.
        accounted: steps in the accountant.
        uses: at the start, after :data:`WARM` steps, at the end.
    """

    engine: str
    draws: int
    empty: int
    refused: int
    accounted: int
    uses: tuple[Use, Use, Use]

    def wrong(self) -> list[str]:
        start, warm, end = self.uses
        found = [f"{self.refused} steps were refused"] if self.refused else []
        if self.accounted != self.draws:
            found.append(f"{self.accounted} steps in the accountant, and {self.draws} draws")
        if end.memory > warm.memory + LARGEST_GROWTH:
            found.append(f"memory grew from {warm.memory:.0f} to {end.memory:.0f} MiB")
        if max(end.files, warm.files) > start.files:
            found.append(f"{start.files} open files became {end.files}")
        return found


def _loss(model: nn.Module, batch: Any) -> torch.Tensor:
    out = model(batch[0])
    return F.cross_entropy(out.movedim(-1, 1) if out.dim() == 3 else out, batch[1])


def count_draws() -> list[int]:
    """The sizes of the draws that this process will make, as they are made; an empty one reaches no loop as such."""
    sizes: list[int] = []
    draw = PoissonSampler.__iter__

    def counted(sampler: PoissonSampler) -> Iterator[list[int]]:
        for drawn in draw(sampler):
            sizes.append(len(drawn))
            yield drawn

    PoissonSampler.__iter__ = counted  # type: ignore[method-assign]
    return sizes


def train(name: str, steps: int) -> Long:
    """Train a model; in a process of its own, whose memory is looked at."""
    quiet()
    build, samples = MODELS[name]
    model = build()
    training = dpfix.make_private_safe(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
        data_loader=DataLoader(samples(), batch_size=BATCH),  # type: ignore[arg-type]
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        training_step=_loss,
        cache=False,
    )
    stepping, optimizer, loader = training
    sizes, made, refused = count_draws(), 0, 0
    uses = [Use.now()]
    while made < steps:
        for batch in loader:
            made += 1
            try:
                optimizer.zero_grad()
                _loss(stepping, batch).backward()
                optimizer.step()
            except dpfix.DPFixError:
                refused += 1
            if made == min(WARM, steps):
                uses.append(Use.now())
            if made == steps:
                break
    uses.append(Use.now())
    accounted = accounted_steps(training.privacy_engine.accountant)
    empty = sizes.count(0)
    return Long(training.plan.engine, len(sizes), empty, refused, accounted, (uses[0], uses[1], uses[2]))


def measure(steps: int, names: list[str] | None = None) -> Part:
    titles = (
        "model", "engine", "draws", "of them empty", "steps refused", "steps in the accountant", "resident MiB at the start",
        f"after {min(WARM, steps):,}", "at the end", "open files at the start", "at the end",
    )  # fmt: skip
    lines, wrong = tables.head(*titles), []
    for name in names or MODELS:
        long: Long = in_a_fresh_process(train, name, steps)
        start, warm, end = long.uses
        lines.append(
            tables.row(
                name, long.engine, f"{long.draws:,}", f"{long.empty:,}", long.refused, f"{long.accounted:,}",
                f"{start.memory:.0f}", f"{warm.memory:.0f}", f"{end.memory:.0f}", start.files, end.files,
            )
        )  # fmt: skip
        wrong += [f"{name}: {fact}" for fact in long.wrong()]
    size = f"{steps:,} steps of each model, {ITEMS} samples, batches of {BATCH} on average, each model in a process of its own."
    return Part([size, "", *lines], wrong)

"""Time and memory of a private training step, as multiples of an ordinary one.

``python -m benchmarks.engine_speed [--models CNN ...] [--contestants auto bookkeeping "Opacus hooks" ...] [--write]``

*step*: process CPU time on one thread of forward, backward and optimizer step, medians of rounds in which the ordinary
step (SGD on the same repaired model) and all contestants take turns in one process. *memory*: largest number of bytes
that tensors hold during a warm step, every contestant in a process of its own. The private step is the whole one:
clipping, noise, Opacus's optimizer and accountant. ``--write`` writes JSON, a table and charts to
``benchmarks/results/`` and the page ``docs/speed.md``.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import opacus
import torch
import torch.nn.functional as F
from opacus import PrivacyEngine
from opacus.validators import ModuleValidator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dpfix
from benchmarks.common import tables
from benchmarks.common.libraries import FAILURES
from benchmarks.common.models import CharLSTM, ResNet18, Transformer, autoencoder, classify, cnn, mlp, unet, vnet
from benchmarks.common.process import cpu_seconds, in_a_fresh_process, peak_bytes

ORDINARY = "non-private"
PEERS = ("Opacus hooks", "Opacus functorch", "Opacus ghost", "Opacus ew")
OWN = ("auto", "bookkeeping", "vmap")
TOO_SLOW = 20
"""A contestant this many times slower than the ordinary step is timed once."""
RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "speed.md"


# ------------------------------------------------------------------ the contests


def reconstruction(model: nn.Module, batch: Any) -> Tensor:
    return F.mse_loss(model(batch[0])[0], batch[0])


def tokens(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


@dataclass(frozen=True)
class Contest:
    """A model, one batch of its data, and the loop's training step."""

    model: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]
    step: Callable[[nn.Module, Any], Tensor]


def labels(classes: int, *shape: int) -> Tensor:
    return torch.randint(0, classes, shape)


CONTESTS: dict[str, Contest] = {
    "MLP": Contest(mlp, lambda: (torch.randn(256, 784), labels(10, 256)), classify),
    "CNN": Contest(cnn, lambda: (torch.randn(256, 1, 28, 28), labels(10, 256)), classify),
    "transformer": Contest(Transformer, lambda: (labels(10_000, 16, 128), labels(10_000, 16, 128)), tokens),
    "ResNet18-GN": Contest(ResNet18, lambda: (torch.randn(32, 3, 32, 32), labels(10, 32)), classify),
    "UNet 3D": Contest(unet, lambda: (torch.randn(4, 1, 32, 32, 32), labels(2, 4, 32, 32, 32)), classify),
    "VNet": Contest(vnet, lambda: (torch.randn(2, 1, 32, 32, 32), labels(2, 2, 32, 32, 32)), classify),
    "AutoencoderKL": Contest(autoencoder, lambda: (torch.randn(4, 1, 64, 64), labels(2, 4)), reconstruction),
    "char LSTM": Contest(CharLSTM, lambda: (labels(80, 64, 64), labels(80, 64, 64)), tokens),
}


def pictures(size: int) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 1, 28, 28), labels(10, size)


LARGER = "UNet 3D, batch 16"
"""Measured by :mod:`benchmarks.augmentation_digits` only."""
CONTESTS[LARGER] = Contest(unet, lambda: (torch.randn(16, 1, 32, 32, 32), labels(2, 16, 32, 32, 32)), classify)
SCALING = tuple(f"CNN, batch {size}" for size in (8, 32, 128, 512))
CONTESTS |= {
    name: Contest(cnn, partial(pictures, size), classify) for name, size in zip(SCALING, (8, 32, 128, 512), strict=True)
}


# ------------------------------------------------------------------ the steps


def opacus_stepper(name: str, mode: str) -> Callable[[], None]:
    """One training step of plain Opacus, after ``ModuleValidator.fix``."""
    contest = CONTESTS[name]
    torch.manual_seed(0)
    model, data = ModuleValidator.fix(contest.model().train()), contest.batch()
    ghost = mode == "ghost"
    criterion = nn.MSELoss() if contest.step is reconstruction else nn.CrossEntropyLoss()
    private, optimizer, *rest = PrivacyEngine().make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=1e-3),
        data_loader=DataLoader(TensorDataset(*data), batch_size=len(data[0])), criterion=criterion,
        noise_multiplier=1.0, max_grad_norm=1.0, poisson_sampling=False, grad_sample_mode=mode,
    )  # fmt: skip

    def loss() -> Any:
        if not ghost:
            return contest.step(private, data)
        if contest.step is reconstruction:
            image = data[0]
            return rest[0](private(image)[0].flatten(), image.flatten(), shape=(len(image), image[0].numel()))
        if contest.step is tokens:
            return rest[0](private(data[0]).flatten(0, 1), data[1].flatten(), shape=tuple(data[1].shape))
        if data[1].dim() > 1:  # one label per voxel
            rows = private(data[0]).flatten(2).mT.flatten(0, 1)
            return rest[0](rows, data[1].flatten(), shape=(len(data[1]), data[1][0].numel()))
        return rest[0](private(data[0]), data[1])

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def grouped(data: tuple[Tensor, ...], views: int) -> DataLoader[Any]:
    """A loader whose samples are several rows each, next to each other."""
    if views == 1:
        return DataLoader(TensorDataset(*data), batch_size=len(data[0]))

    def flat(items: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        return tuple(torch.cat(column) for column in zip(*items, strict=True))

    samples = TensorDataset(*(t.unflatten(0, (-1, views)) for t in data))
    return DataLoader(samples, batch_size=len(samples), collate_fn=flat)


def stepper(name: str, engine: str, views: int = 1) -> tuple[Callable[[], None], str]:
    """One training step of a contestant, and the engine that was really used; a sample is ``views`` rows of the batch."""
    if engine in PEERS:
        return opacus_stepper(name, engine.split()[1]), engine
    contest = CONTESTS[name]
    torch.manual_seed(0)
    model, data = contest.model().train(), contest.batch()
    sgd = torch.optim.SGD(model.parameters(), lr=1e-3)
    loader = grouped(data, views)
    mode = "bookkeeping" if engine == ORDINARY else engine
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        training = dpfix.make_private_safe(
            module=model, optimizer=sgd, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0,
            training_step=contest.step, poisson_sampling=False, grad_sample_mode=mode, cache=True,
        )  # fmt: skip
    private, optimizer, _ = training
    used = training.plan.engine
    if engine == ORDINARY:  # the same repaired model
        private = copy.deepcopy(private.to_standard_module())
        optimizer = torch.optim.SGD(private.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        contest.step(private, data).backward()
        optimizer.step()

    return step, used


def step_times(name: str, contestants: Sequence[str], rounds: int) -> dict[str, Any]:
    """Median CPU seconds of a step, the contestants taking turns; the error's text for one that cannot run."""
    found: dict[str, Any] = {}
    steps: dict[str, Callable[[], None]] = {}
    used = ""
    for contestant in (ORDINARY, *contestants):
        try:
            step, engine = stepper(name, contestant)
            step()
            found[contestant] = [cpu_seconds(step)]
        except (dpfix.DPFixError, *FAILURES) as error:
            found[contestant] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            continue
        steps[contestant], used = step, engine if contestant == "auto" else used
    for _ in range(rounds):
        for contestant, step in steps.items():
            if found[contestant][0] < TOO_SLOW * found[ORDINARY][0]:
                found[contestant].append(cpu_seconds(step))
    times = {c: t if isinstance(t, str) else statistics.median(t[1:] or t) for c, t in found.items()}
    return times | {"auto took": used}


def peak(name: str, engine: str, views: int = 1) -> int:
    """Largest number of bytes that tensors hold during a warm step of a contestant."""
    return peak_bytes(stepper(name, engine, views)[0])


def measured(name: str, contestants: Sequence[str], rounds: int, memory: bool) -> dict[str, Any]:
    """Seconds and bytes of every contestant on one model."""
    times = in_a_fresh_process(step_times, name, contestants, rounds)
    rows: dict[str, Any] = {"seconds": times, "auto took": times.pop("auto took"), "bytes": {}}
    if memory:
        for contestant, value in times.items():
            if contestant == rows["auto took"] and "auto" in rows["bytes"]:
                rows["bytes"][contestant] = rows["bytes"]["auto"]
            elif not isinstance(value, str) and value < TOO_SLOW * times[ORDINARY]:
                rows["bytes"][contestant] = in_a_fresh_process(peak, name, contestant)
    return rows


def cell(rows: dict[str, Any], contestant: str) -> str:
    value = rows["seconds"].get(contestant)
    if value is None:
        return ""
    if isinstance(value, str):
        return "fails"
    text = f"{value / rows['seconds'][ORDINARY]:.2f}"
    if contestant in rows["bytes"]:
        text += f" [{rows['bytes'][contestant] / rows['bytes'][ORDINARY]:.2f}]"
    return text + (f" {rows['auto took']}" if contestant == "auto" else "")


def table(results: dict[str, Any], contestants: Sequence[str]) -> str:
    lines = tables.head("model", "ordinary step", *contestants)
    for name, rows in results.items():
        first = f"{rows['seconds'][ORDINARY] * 1e3:.0f} ms"
        lines.append(tables.row(name, first, *(cell(rows, c) for c in contestants)))
    return "\n".join(lines)


def chart(results: dict[str, Any], contestants: Sequence[str], kind: str, path: Path) -> None:
    """Bars of one kind of ratio, model by model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(contestants)
    for number, contestant in enumerate(contestants):
        heights = []
        for rows in results.values():
            value, base = rows[kind].get(contestant), rows[kind].get(ORDINARY)
            heights.append(value / base if isinstance(value, (int, float)) and base else 0)
        axes.bar([i + number * width for i in range(len(results))], heights, width, label=contestant)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.8)
    axes.set_xticks([i + 0.4 - width / 2 for i in range(len(results))], list(results), rotation=20)
    axes.set_ylabel({"seconds": "step", "bytes": "peak memory"}[kind] + " / non-private")
    axes.legend(ncols=4, fontsize="small")
    figure.savefig(path, dpi=110)


def failures(results: dict[str, Any]) -> str:
    """Why contestants cannot train a model, one line each."""
    lines = [
        f"- {name}, {contestant}: {text.replace('`', '')}"
        for name, rows in results.items()
        for contestant, text in rows["seconds"].items()
        if isinstance(text, str)
    ]
    return "\n".join(lines)


def page(text: str, why: str, about: dict[str, Any]) -> str:
    return f"""# Speed and memory

Written by `python -m benchmarks.engine_speed --write` (part of `make bench`).

A private training step as a multiple of an ordinary one (SGD on the same repaired model): CPU time on one thread, and
in brackets the largest number of bytes that tensors hold during a warm step. Lower is better. `auto` is what
`make_private_safe` takes by itself, and the engine it took. *fails*: see the end of the page. Opacus gets
the model after `ModuleValidator.fix`. Where there is no bracket, the step was more than {TOO_SLOW} times slower than an
ordinary one, and memory was not measured.

{text}

torch {about["torch"]}, Opacus {about["opacus"]}, {about["machine"]}, one thread.

![Step time](assets/speed-step.png)

![Peak memory](assets/speed-memory.png)

What failed, with the first words of the error:

{why}
"""


def environment() -> dict[str, Any]:
    machine = platform.processor() or platform.machine()
    return {
        "torch": torch.__version__, "opacus": opacus.__version__, "dpfix": dpfix.__version__,
        "python": platform.python_version(), "machine": machine, "threads": 1,
    }  # fmt: skip


def earlier() -> dict[str, Any]:
    """What an earlier run in the same environment has written: the models can be measured in several runs."""
    try:
        found = json.loads((RESULTS / "engine_speed.json").read_text())
    except (OSError, ValueError):
        return {}
    return found["results"] if found["environment"] == environment() else {}


def write(results: dict[str, Any], contestants: Sequence[str]) -> None:
    about = environment()
    every = earlier() | results
    results = {name: every[name] for name in CONTESTS if name in every}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "engine_speed.json").write_text(json.dumps({"environment": about, "results": results}, indent=1) + "\n")
    text = table(results, contestants)
    (RESULTS / "engine_speed.md").write_text(text + "\n")
    (PAGE.parent / "assets").mkdir(exist_ok=True)
    models = {name: rows for name, rows in results.items() if name not in SCALING}
    for kind, name in (("seconds", "step"), ("bytes", "memory")):
        path = RESULTS / f"speed-{name}.png"
        chart(models, contestants, kind, path)
        (PAGE.parent / "assets" / path.name).write_bytes(path.read_bytes())
    PAGE.write_text(page(text, failures(results), about))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contestants", nargs="+", default=[*OWN, *PEERS])
    parser.add_argument("--models", nargs="+", default=[n for n in CONTESTS if n != LARGER], choices=list(CONTESTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args(arguments)
    results: dict[str, Any] = {}
    for name in given.models:
        few = [
            c
            for c in given.contestants
            if name not in SCALING or c in ("auto", "bookkeeping", "Opacus hooks", "Opacus ghost")
        ]
        results[name] = measured(name, few, given.rounds, not given.no_memory)
        print(table({name: results[name]}, given.contestants).splitlines()[-1], flush=True)
        if given.write:
            write(results, given.contestants)
    print(table(results, given.contestants))
    return 0


if __name__ == "__main__":
    sys.exit(main())

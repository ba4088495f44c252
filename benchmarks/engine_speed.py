"""Time, memory and operations of a private training step, as multiples of an ordinary one.

``python -m benchmarks.engine_speed [--models CNN ...] [--contestants auto ...] [--threads 2 | --gpu] [--operations | --parts]
[--write]``

*step*: forward, backward and optimizer step, medians of rounds in which the ordinary step (SGD on the same repaired
model) and all contestants take turns in one process: CPU time on one thread, time on the wall on several threads or on
a GPU. *memory*: largest number of bytes that tensors hold during a warm step, and what the process holds of the
machine's memory after it, every contestant in a process of its own. *call*: ``make_private_safe``, in ordinary steps.
*operations*: those torch dispatches in a step. *parts*: where the time of the ordinary step and of the private one
goes. The private step is the whole one: clipping, noise, the checks of a step, Opacus's optimizer and accountant.
``--write`` writes JSON, tables and charts to ``benchmarks/results/`` and the page
``docs/speed.md``.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any
from unittest import mock

import opacus
import torch
from opacus import PrivacyEngine
from opacus.validators import ModuleValidator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dpfix
from benchmarks.common import tables
from benchmarks.common.contests import (
    CONTESTS,
    LARGER,
    SCALING,
    Batch,
    Contest,
    classify_image,
    classify_text,
    compare,
    denoise,
    next_word,
    reconstruction,
    translate,
)
from benchmarks.common.libraries import FAILURES
from benchmarks.common.parts import PARTS, Clock, medians, parts_of_step
from benchmarks.common.process import (
    cpu_seconds,
    in_a_fresh_process,
    operations,
    peak_bytes,
    peak_on_gpu,
    resident_bytes,
    wall_seconds,
)  # fmt: skip
from dpfix.engines.bookkeeping import blocks
from dpfix.training import normal_noise

ORDINARY = "non-private"
PEERS = ("Opacus hooks", "Opacus functorch", "Opacus ghost", "Opacus ew")
OWN = ("auto", "bookkeeping", "vmap")
TOO_SLOW = 20
"""A contestant this many times slower than the ordinary step is timed once."""
RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "speed.md"


# ------------------------------------------------------------------ the steps


def made(name: str, device: str) -> tuple[nn.Module, Batch]:
    """The model of a contest, and one batch."""
    contest = CONTESTS[name]
    torch.manual_seed(0)
    size = contest.size if device == "cpu" else contest.on_gpu
    assert size is not None
    return contest.model().train().to(device), tuple(t.to(device) for t in contest.batch(size))


PICTURES = (reconstruction, denoise)
"""Steps whose targets are pictures."""


def called(contest: Contest, model: nn.Module, data: Any) -> Tensor:
    """What a model returns for a batch, for who wants to apply a criterion to it."""
    if contest.step in (next_word, classify_text):
        return model(input_ids=data[0]).logits
    if contest.step is classify_image:
        return model(pixel_values=data[0]).logits
    if contest.step is translate:
        return model(input_ids=data[0], labels=data[1]).logits
    if contest.step is denoise:
        return model(data[0], timesteps=data[2])
    return model(data[0])[0] if contest.step is reconstruction else model(data[0])


def opacus_stepper(name: str, mode: str, device: str) -> Callable[[], None]:
    """One training step of plain Opacus, after ``ModuleValidator.fix``."""
    contest = CONTESTS[name]
    model, data = made(name, device)
    model = ModuleValidator.fix(model).to(device)
    ghost = mode == "ghost"
    criterion = nn.MSELoss() if contest.step in PICTURES else nn.CrossEntropyLoss()
    private, optimizer, *rest = PrivacyEngine().make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=1e-3),
        data_loader=DataLoader(TensorDataset(*data), batch_size=len(data[0])), criterion=criterion,
        noise_multiplier=1.0, max_grad_norm=1.0, poisson_sampling=False, grad_sample_mode=mode,
    )  # fmt: skip

    def loss() -> Any:
        if not ghost:
            return contest.step(private, data)
        out, target = called(contest, private, data), data[0] if contest.step is reconstruction else data[1]
        if contest.step in PICTURES:
            return rest[0](out.flatten(), target.flatten(), shape=(len(target), target[0].numel()))
        if target.dim() > 2:  # one label per voxel
            rows = out.flatten(2).mT.flatten(0, 1)
            return rest[0](rows, target.flatten(), shape=(len(target), target[0].numel()))
        if target.dim() > 1:  # one per word
            return rest[0](out.flatten(0, 1), target.flatten(), shape=tuple(target.shape))
        return rest[0](out, target)

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


def stepper(name: str, engine: str, views: int = 1, device: str = "cpu") -> tuple[Callable[[], None], str]:
    """One training step of a contestant, and the engine that was really used; a sample is ``views`` rows of the batch."""
    if engine in PEERS:
        return opacus_stepper(name, engine.split()[1], device), engine
    contest = CONTESTS[name]
    model, data = made(name, device)
    training = private(name, model, data, "bookkeeping" if engine == ORDINARY else engine, views)
    stepping, optimizer, _ = training
    agenda = optimizer.guard.real_steps.agenda
    if engine == ORDINARY:  # the same repaired model
        stepping = copy.deepcopy(stepping.to_standard_module())
        optimizer = torch.optim.SGD(stepping.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        contest.step(stepping, data).backward()
        optimizer.step()

    step()
    agenda.due = lambda seen: False  # benchmarks.audit_cost measures the steps that are checked
    return step, training.plan.engine


def private(name: str, model: nn.Module, data: Batch, mode: str, views: int = 1) -> dpfix.PrivateTraining:
    """The call, without a word."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dpfix.make_private_safe(
            module=model, optimizer=torch.optim.SGD(model.parameters(), lr=1e-3), data_loader=grouped(data, views),
            noise_multiplier=1.0, max_grad_norm=1.0, training_step=CONTESTS[name].step, poisson_sampling=False,
            grad_sample_mode=mode, cache=True,
        )  # fmt: skip


def step_times(name: str, contestants: Sequence[str], rounds: int, device: str = "cpu") -> dict[str, Any]:
    """Median seconds of a step, the contestants taking turns; the error's text for one that cannot run."""
    seconds = cpu_seconds if device == "cpu" and torch.get_num_threads() == 1 else wall_seconds
    found: dict[str, Any] = {}
    steps: dict[str, Callable[[], None]] = {}
    used = ""
    for contestant in (ORDINARY, *contestants):
        try:
            step, engine = stepper(name, contestant, device=device)
            step()
            found[contestant] = [seconds(step)]
        except (dpfix.DPFixError, *FAILURES) as error:
            found[contestant] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            continue
        steps[contestant], used = step, engine if contestant == "auto" else used
    for _ in range(rounds):
        for contestant, step in steps.items():
            if found[contestant][0] < TOO_SLOW * found[ORDINARY][0]:
                found[contestant].append(seconds(step))
    times = {c: t if isinstance(t, str) else statistics.median(t[1:] or t) for c, t in found.items()}
    return {"seconds": times, "auto took": used} | counted(steps, device)


def counted(steps: dict[str, Callable[[], None]], device: str) -> dict[str, Any]:
    """Operations of the steps that were made before."""
    found: dict[str, Any] = {"operations": {c: operations(steps[c]) for c in (ORDINARY, *OWN) if c in steps}}
    if "auto" in steps and device == "cpu":
        with treated_as_an_accelerator():
            steps["auto"]()
            found["operations with an accelerator's blocks"] = operations(steps["auto"])
    return found


def parts(name: str, rounds: int) -> dict[str, Any]:
    """Seconds of the parts of an ordinary step and of the one that ``auto`` makes, in turn; and how many numbers are trained."""
    contest = CONTESTS[name]
    model, data = made(name, "cpu")
    training = private(name, model, data, "auto")
    module, private_optimizer, _ = training
    plain = copy.deepcopy(module).to_standard_module()  # a copy is in no training
    optimizer = torch.optim.SGD(plain.parameters(), lr=1e-3)
    contest.step(module, data).backward()
    private_optimizer.step()
    private_optimizer.guard.real_steps.agenda.due = lambda seen: False
    now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    ordinary, auto = list[dict[str, float]](), list[dict[str, float]]()
    for _ in range(rounds):
        clock = Clock(now)
        optimizer.zero_grad()
        with clock.part("forward"):
            loss = contest.step(plain, data)
        with clock.part("backward"):
            loss.backward()
        with clock.part("the rest"):
            optimizer.step()
        ordinary.append(clock.seconds)
        auto.append(parts_of_step(training, lambda: contest.step(module, data), now))
    numbers = sum(p.numel() for p in plain.parameters() if p.requires_grad)
    return {"parts": {ORDINARY: medians(ordinary), "auto": medians(auto)}, "numbers": numbers}


def operation_counts(name: str) -> dict[str, Any]:
    """Operations alone, which other work on the machine does not change."""
    steps = {c: stepper(name, c)[0] for c in (ORDINARY, "auto")}
    for step in steps.values():
        step()
    return counted(steps, "cpu")


@contextmanager
def treated_as_an_accelerator() -> Iterator[None]:
    """The engine and the noise take as much at once as on a GPU, and nothing is computed sample by sample."""
    with (
        mock.patch.dict(blocks.CACHE, clear=True),
        mock.patch.dict(normal_noise.AT_ONCE, cpu=normal_noise.AT_ONCE["cuda"]),
    ):
        yield


def peak(name: str, engine: str, views: int = 1, device: str = "cpu") -> int:
    """Largest number of bytes that tensors hold during a warm step of a contestant."""
    step = stepper(name, engine, views, device)[0]
    return peak_bytes(step) if device == "cpu" else peak_on_gpu(step)


def resident(name: str, engine: str) -> int:
    """Bytes that the process of a contestant holds after the call and a few steps."""
    if engine == ORDINARY:  # without a private training before it
        model, data = made(name, "cpu")
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

        def step() -> None:
            optimizer.zero_grad()
            CONTESTS[name].step(model, data).backward()
            optimizer.step()

    else:
        step, _ = stepper(name, engine)
    for _ in range(3):
        step()
    gc.collect()
    return resident_bytes()


def call_seconds(name: str, device: str) -> float:
    """Seconds of ``make_private_safe`` in a process that has made a step with the model before."""
    model, data = made(name, device)
    CONTESTS[name].step(copy.deepcopy(model), data).backward()
    seconds = cpu_seconds if device == "cpu" and torch.get_num_threads() == 1 else wall_seconds
    return seconds(partial(private, name, model, data, "auto"))


def measured(name: str, contestants: Sequence[str], given: argparse.Namespace) -> dict[str, Any]:
    """What is measured of every contestant on one model."""
    fresh = partial(in_a_fresh_process, threads=given.threads)
    device = "cuda" if given.gpu else "cpu"
    rows: dict[str, Any] = fresh(step_times, name, contestants, given.rounds, device)
    times = rows["seconds"]
    if "auto" in contestants and not isinstance(times["auto"], str):
        rows["call"] = fresh(call_seconds, name, device)
    rows["bytes"], rows["resident"] = {}, {}
    if given.no_memory:
        return rows
    for contestant, value in times.items():
        if contestant == rows["auto took"] and "auto" in rows["bytes"]:
            rows["bytes"][contestant] = rows["bytes"]["auto"]
        elif not isinstance(value, str) and value < TOO_SLOW * times[ORDINARY]:
            rows["bytes"][contestant] = fresh(peak, name, contestant, 1, device)
    if device == "cpu":
        rows["resident"] = {c: fresh(resident, name, c) for c in (ORDINARY, "auto") if c in rows["bytes"]}
        if "auto" in rows["bytes"]:
            rows |= fresh(parts, name, given.rounds)
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


MARKERS = "DosPXv^<"
"""Shapes of the contestants' points: they are told apart without colour. dpfix's are filled."""


def chart(results: dict[str, Any], contestants: Sequence[str], kind: str, path: Path) -> None:
    """A line of points for every model: one kind of ratio, contestant by contestant."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.6 * len(results) + 1.4), layout="constrained")
    axes = figure.subplots()
    for number, (contestant, marker) in enumerate(zip(contestants, cycle(MARKERS), strict=False)):
        ratios = {}
        for place, rows in enumerate(results.values()):
            value, base = rows[kind].get(contestant), rows[kind].get(ORDINARY)
            if isinstance(value, (int, float)) and base:
                ratios[place + 0.6 * (number / max(len(contestants) - 1, 1) - 0.5)] = value / base
        face = "tab:blue" if contestant in OWN else "none"
        axes.plot(list(ratios.values()), list(ratios), marker, label=contestant, mfc=face, mec="black", ms=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks(range(len(results)), list(results))
    axes.set_ylim(len(results) - 0.5, -0.5)
    for between in range(1, len(results)):
        axes.axhline(between - 0.5, color="lightgrey", linewidth=0.8)
    axes.set_xlabel({"seconds": "step", "bytes": "peak memory"}[kind] + " / non-private")
    figure.legend(loc="outside upper center", ncols=4, fontsize="small")
    figure.savefig(path, dpi=110, metadata={"Software": None})


def failures(results: dict[str, Any]) -> str:
    """Why contestants cannot train a model, one line each."""
    lines = [
        f"- {name}, {contestant}: {text.replace('`', '')}"
        for name, rows in results.items()
        for contestant, text in rows["seconds"].items()
        if isinstance(text, str)
    ]
    return "\n".join(lines)


def others(results: dict[str, Any]) -> str:
    """What the step and the call take beside time."""
    lines = tables.head(
        "model", "operations of the ordinary step", "of the private one", "with an accelerator's blocks",
        "the call, in steps", "resident",
    )  # fmt: skip
    for name, rows in results.items():
        if "call" not in rows:
            continue
        counts, held = rows["operations"], rows["resident"]
        private = (counts.get("auto"), rows.get("operations with an accelerator's blocks"))
        lines.append(tables.row(
            name, str(counts[ORDINARY]), *(f"{n} ({n / counts[ORDINARY]:.1f})" if n else "" for n in private),
            f"{rows['call'] / rows['seconds'][ORDINARY]:.1f} ({rows['call']:.1f} s)",
            f"{held['auto'] / held[ORDINARY]:.2f}" if "auto" in held else "",
        ))  # fmt: skip
    return "\n".join(lines)


def parts_table(results: dict[str, Any]) -> str:
    """Where the time goes, in ordinary steps; empty where it was not measured."""
    found = {name: rows for name, rows in results.items() if "parts" in rows}
    if not found:
        return ""
    lines = tables.head("model", "numbers trained", *PARTS, "together")
    for name, rows in found.items():
        ordinary, auto = rows["parts"][ORDINARY], rows["parts"]["auto"]
        whole = sum(ordinary.values())
        cells = [
            f"{auto[part] / whole:.2f}" + (f" ({ordinary[part] / whole:.2f})" if part in ordinary else "")
            for part in PARTS
        ]
        lines.append(tables.row(name, f"{rows['numbers'] / 1e6:.2f} M", *cells, f"{sum(auto.values()) / whole:.2f}"))
    return "\n".join(lines)


INTRODUCTION = f"""# Speed and memory

Written by `python -m benchmarks.engine_speed --write` (part of `make bench`; `--threads 2` and `--gpu` write the other
tables).

A private training step as a multiple of an ordinary one (SGD on the same repaired model), and in brackets the largest
number of bytes that tensors hold during a warm step. Lower is better. `auto` is what `make_private_safe` takes by
itself, and the engine it took. The steps are those of a training that goes on; what the checks of the first steps, and
of others by chance, cost is on [the page of the checks](checks.md). *fails*: see below the table. Opacus gets the model
after `ModuleValidator.fix`. An empty cell was not measured. Where there is no bracket, the step was more than {TOO_SLOW}
times slower than an ordinary one, and memory was not measured.

![Step time](assets/speed-step.png)

![Peak memory](assets/speed-memory.png)
"""

TITLES = {
    "1 thread": "## One thread\n\nCPU time.",
    "2 threads": "## Two threads\n\nTime on the wall.",
    "GPU": "## A GPU\n\nTime on the wall, at batch sizes that fill the GPU better.",
}


WHERE = """Where the time of the step of `auto` goes, in ordinary steps (`--parts` measures it alone; in brackets the ordinary
step's own part). *backward* has no weight gradients in it where the sum of them is made later: *norms* are those of the
gradients of single samples, *sums* the clipped sums, which take the place of the ordinary weight gradients. *noise* is one
normal number for every number that is trained."""


def page(every: dict[str, Any]) -> str:
    lines = [INTRODUCTION]
    for key, title in TITLES.items():
        if key not in every:
            continue
        about, results = every[key]["environment"], every[key]["results"]
        shown = [c for c in (*OWN, *PEERS) if any(c in rows["seconds"] for rows in results.values())]
        lines += [title, table(results, shown)]
        lines.append(f"torch {about['torch']}, Opacus {about['opacus']}, {about['machine']}, {about['setting']}.")
        lines.append("What else `auto` takes: operations that torch dispatches in a step, the same where the processor is"
                     " treated like an accelerator (there is no cache to stay in, so a layer is measured in one part), the call,"
                     " and the memory that the process holds after it and three steps, as a multiple of an ordinary"
                     " training's.")  # fmt: skip
        lines.append(others(results))
        if where := parts_table(results):
            lines += [WHERE, where]
        if why := failures(results):
            lines += ["What failed, with the first words of the error:", why]
    return "\n\n".join(lines) + "\n"


def environment(given: argparse.Namespace) -> dict[str, Any]:
    setting = f"{given.threads} threads" if given.threads > 1 else "1 thread"
    machine = torch.cuda.get_device_name() if given.gpu else platform.processor() or platform.machine()
    return {
        "torch": torch.__version__, "opacus": opacus.__version__, "dpfix": dpfix.__version__,
        "python": platform.python_version(), "machine": machine, "setting": "GPU" if given.gpu else setting,
    }  # fmt: skip


def known(about: dict[str, str]) -> dict[str, Any]:
    """What earlier runs have written in this environment."""
    kept = RESULTS / "engine_speed.json"
    before = json.loads(kept.read_text()).get(about["setting"], {}) if kept.exists() else {}
    return before["results"] if before.get("environment") == about else {}


def write(results: dict[str, Any], given: argparse.Namespace) -> None:
    """Adds to what earlier runs have written: models and settings can be measured in several runs."""
    about, kept = environment(given), RESULTS / "engine_speed.json"
    every = json.loads(kept.read_text()) if kept.exists() else {}
    all_results = known(about) | results
    every[about["setting"]] = {
        "environment": about,
        "results": {name: all_results[name] for name in CONTESTS if name in all_results},
    }
    kept.write_text(json.dumps(every, indent=1) + "\n")
    if "1 thread" in every:
        models = {name: rows for name, rows in every["1 thread"]["results"].items() if name not in SCALING}
        for kind, name in (("seconds", "step"), ("bytes", "memory")):
            chart(models, [*OWN, *PEERS], kind, PAGE.parent / "assets" / f"speed-{name}.png")
    PAGE.write_text(page(every))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contestants", nargs="+", default=[*OWN, *PEERS])
    parser.add_argument("--models", nargs="+", choices=list(CONTESTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--operations", action="store_true", help="count the operations only; the rest of a row stays")
    parser.add_argument(
        "--parts", action="store_true", help="measure the parts of a step only; the rest of a row stays"
    )
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args(arguments)
    results: dict[str, Any] = {}
    for name in given.models or [n for n, c in CONTESTS.items() if n != LARGER and (c.on_gpu or not given.gpu)]:
        few = [
            c
            for c in given.contestants
            if (name not in SCALING or c in ("auto", "bookkeeping", "Opacus hooks", "Opacus ghost"))
            and not (
                c == "Opacus ghost" and CONTESTS[name].step is compare
            )  # it takes a criterion of output and target
        ]
        if given.operations or given.parts:
            before = known(environment(given)).get(name, {"seconds": {}, "bytes": {}, "resident": {}})
            if given.operations:
                results[name] = before | in_a_fresh_process(operation_counts, name)
                print(name, results[name]["operations"], flush=True)
            else:
                results[name] = before | in_a_fresh_process(parts, name, given.rounds, threads=given.threads)
                print(parts_table({name: results[name]}).splitlines()[-1], flush=True)
            if given.write:
                write(results, given)
            continue
        results[name] = measured(name, few, given)
        print(table({name: results[name]}, given.contestants).splitlines()[-1], flush=True)
        if given.write:
            write(results, given)
    if not (given.operations or given.parts):
        print(table(results, given.contestants))
    print(others(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Every trainable network of ``monai.networks.nets``: what plain Opacus does with it, and what dpfix does.

``python benchmarks/zoo.py [--only TEXT] [--jobs N] [--timeout SECONDS] [--write]``

Each network of :mod:`zoo_networks` is trained by both, with noise, on three Poisson draws, with the loss it is made for. Plain
Opacus gets the model after ``ModuleValidator.fix``. Then, for both:

* *error*: distance of the sum that is released without noise from the sum of clipped gradients taken one sample at a time
  with ordinary autograd; per parameter, relative to its norm; of several samples at two clip norms, and of one. Layers that
  start at zero are filled, dropout is off, and random numbers drawn in ``forward`` are the same for every sample.
* an empty Poisson draw, and one of a single sample.

Time is that of a whole step (forward, backward, ``optimizer.step()`` with noise) over the same without privacy, on the same
batches, taking turns. The exit status is 1 if dpfix gets a network wrong, or refuses one without the reason noted for it.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import multiprocessing
import os
import platform
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from opacus import PrivacyEngine
from opacus.validators import ModuleValidator
from torch import Generator, Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader

import dpfix

sys.path.insert(0, str(Path(__file__).parent))
from side_by_side import FAILURES, Gradients, clipped_sum, draws, gradient, norm, released
from zoo_networks import NETWORKS, STANDS_FOR, Network

ROOT = Path(__file__).parents[1]
SAMPLES = 4
"""Samples of which the released sum is compared."""
LARGEST_ERROR = {torch.float64: 1e-6, torch.float32: 2e-3}
"""Relative error that is still rounding."""
EXACT, REFUSED, WRONG, STOPS, SKIPPED = "exact", "refused", "wrong", "stops", "skipped"
MODES = ("hooks", "functorch")
NOTHING = 1e9
"""A clip norm that clips nothing."""


@dataclass
class Made:
    """What one of the two libraries made of a network.

    Attributes:
        model: the private model.
        optimizer: the private optimizer.
        loader: the private loader.
        reference: returns the model that is trained without anything private on it.
    """

    model: Any
    optimizer: Any
    loader: Any
    reference: Callable[[], nn.Module]


@dataclass
class Opacus:
    """What plain Opacus did in one mode.

    Attributes:
        stops: the error that ended the training, or empty.
        error: relative error of the released sum; ``None`` if it could not be computed.
        empty: the error on an empty draw, or empty.
    """

    stops: str = ""
    error: float | None = None
    empty: str = ""


@dataclass
class Row:
    """What was measured for one network.

    Attributes:
        name: the network.
        task: what it is for.
        verdict: one of :data:`EXACT`, :data:`REFUSED`, :data:`WRONG`, :data:`STOPS`, :data:`SKIPPED`.
        reason: why it is not exact.
        expected: whether that reason is the one noted for the network.
        opacus: what plain Opacus did, by mode.
        found: codes of the findings and how many there were.
        repaired: codes of those that were repaired.
        changed: codes of those whose repair computes another function.
        engine: the engine that trains.
        kept_out: why an engine of dpfix's own is not used, by name.
        error: relative error of the released sum.
        dtype: the dtype of that comparison.
        step: time of a private step over that of a non-private one.
        seconds: how long all of this took.
    """

    name: str
    task: str
    verdict: str = STOPS
    reason: str = ""
    expected: bool = False
    opacus: dict[str, Opacus] = field(default_factory=dict)
    found: dict[str, int] = field(default_factory=dict)
    repaired: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    engine: str = ""
    kept_out: dict[str, str] = field(default_factory=dict)
    error: float | None = None
    dtype: str = ""
    step: float | None = None
    seconds: float = 0.0


# ------------------------------------------------------------------ both libraries


def with_dpfix(network: Network, model: nn.Module, loader: DataLoader[Any], **arguments: Any) -> tuple[Made, Any]:
    made = dpfix.make_private_safe(
        module=model,
        optimizer=sgd(model),
        data_loader=loader,
        max_grad_norm=1.0,
        cache=False,
        training_step=steady(network) if arguments.get("noise_multiplier") == 0 else network.loss,
        **arguments,
    )
    return Made(*made, reference=made[0].to_standard_module), made


def with_opacus(network: Network, model: nn.Module, loader: DataLoader[Any], **arguments: Any) -> Made:
    dtype = next(model.parameters()).dtype
    model = ModuleValidator.fix(model).to(dtype)  # what it replaces comes in single precision
    plain = copy.deepcopy(model)
    made = PrivacyEngine().make_private(
        module=model, optimizer=sgd(model), data_loader=loader, max_grad_norm=1.0, **arguments
    )
    return Made(*made, reference=lambda: plain)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)


def built(network: Network) -> nn.Module:
    torch.manual_seed(0)
    return network.build().train()


def loader_of(network: Network, samples: int, size: int, dtype: torch.dtype = torch.float32) -> DataLoader[Any]:
    """A loader whose generator is its own."""
    draw = Generator().manual_seed(1)
    items = [tuple(cast(part, dtype) for part in network.sample(draw)) for _ in range(samples)]
    return DataLoader(items, batch_size=size, collate_fn=network.collate, generator=Generator(), shuffle=True)  # type: ignore[arg-type]


def cast(part: Any, dtype: torch.dtype) -> Any:
    return part.to(dtype) if isinstance(part, Tensor) and part.is_floating_point() else part


# ------------------------------------------------------------------ training


def train(
    network: Network, made: Made, wanted: Callable[[list[int]], bool], plain: nn.Module | None = None
) -> list[float]:
    """One pass over Poisson draws of wanted sizes; the time of every step over that of the plain model's."""
    generator = made.loader.generator
    generator.manual_seed(next(s for s in range(100_000) if wanted(sizes(generator, made.loader.batch_sampler, s))))
    optimizer = None if plain is None else sgd(plain)
    ratios = []
    for batch in made.loader:
        private = timed(network, made.model, made.optimizer, batch)
        if plain is not None:
            ratios.append(private / timed(network, plain, optimizer, batch))
    return ratios


def sizes(generator: Generator, sampler: Any, seed: int) -> list[int]:
    """Sizes of the batches that a pass draws after a seed."""
    return [len(batch) for batch in draws(generator, sampler, seed)]


def timed(network: Network, model: nn.Module, optimizer: Any, batch: Any) -> float:
    start = time.perf_counter()
    optimizer.zero_grad()
    network.loss(model, batch).backward()
    optimizer.step()
    return time.perf_counter() - start


def ordinary(drawn: list[int]) -> bool:
    return min(drawn) > 1


def with_empty(drawn: list[int]) -> bool:
    return 0 in drawn and 1 not in drawn


def with_single(drawn: list[int]) -> bool:
    return 1 in drawn and 0 not in drawn


# ------------------------------------------------------------------ the released sum


class SameForEverySample(TorchFunctionMode):
    """Random numbers that are the same in every row, so that a sample's gradient does not depend on its batch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        fixed = np.random.default_rng(5)  # numpy: to vmap this is a constant
        if func in {torch.randn, torch.randn_like, torch.rand, torch.rand_like} and out.dim():
            draw = fixed.random if func in {torch.rand, torch.rand_like} else fixed.standard_normal
            return out.copy_(torch.as_tensor(draw(out.shape[1:])))
        if func is torch.multinomial:
            return out.copy_(torch.as_tensor(fixed.permutation(args[0].shape[-1])[: out.shape[-1]]))
        return out


def steady(network: Network) -> Callable[[nn.Module, Any], Tensor]:
    """The training step with the same random numbers for every sample."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        with SameForEverySample():
            return network.loss(model, batch)

    return loss


def definite(model: nn.Module) -> nn.Module:
    """Without dropout, and without layers of zeros, which would hide errors in all layers before them."""
    for module in model.modules():
        for name in ("p", "dropout", "drop_prob", "dropout_p"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    draw = Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.copy_(0.1 * torch.randn(p.shape, generator=draw))
    return model


def released_error(network: Network, made: Made, items: Sequence[Any]) -> float:
    """Largest error of a parameter's released sum; ends the private training.

    Of all samples, unclipped and clipped at about the average norm, and of one sample alone.
    """
    loss, items = steady(network), list(items)
    batch, one = network.collate(items), network.collate(items[:1])

    def found(batch: Any, clip_norm: float) -> Gradients:
        with buffers_kept(made.model):
            return released(made.model, made.optimizer, loss, batch, clip_norm)

    unclipped = found(batch, NOTHING)
    average = norm(unclipped) / len(items)
    sums = [unclipped, found(batch, average), found(one, NOTHING)]
    plain = made.reference()
    singles = []
    for item in items:
        with buffers_kept(plain):
            singles.append(gradient(plain, loss, network.collate([item])))
    wanted = [clipped_sum(singles, NOTHING), clipped_sum(singles, average), clipped_sum(singles[:1], NOTHING)]
    return max(map(worst, sums, wanted))


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Running averages are afterwards as before, so that gradients can be compared."""
    before = {n: b.clone() for n, b in model.named_buffers()}
    yield
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(before[name])


def worst(found: Gradients, wanted: Gradients) -> float:
    """Largest error of a parameter, relative to its own norm or to 2 % of the norm of everything."""
    whole, nothing = norm(wanted), torch.zeros((), dtype=torch.float64)
    errors = [
        norm({"": found.get(n, nothing).double() - wanted.get(n, nothing)})
        / max(norm({"": wanted.get(n, nothing)}), 0.02 * whole)
        for n in found.keys() | wanted.keys()
    ]
    return math.inf if any(math.isnan(e) for e in errors) else max(errors)


# ------------------------------------------------------------------ one network


def measure(network: Network, opacus: bool = True) -> Row:
    """Train a network with both libraries.

    Args:
        network: the network.
        opacus: whether plain Opacus is tried too.

    Returns:
        The row of the table.
    """
    row, start = Row(network.name, network.task), time.perf_counter()
    try:
        built(network)
    except ImportError as error:
        row.verdict, row.reason, row.expected = SKIPPED, missing(error), True
        return row
    if opacus:
        row.opacus = {mode: plain_opacus(network, mode) for mode in MODES}
    try:
        row.verdict = repaired(network, row)
    except dpfix.DPFixError as error:
        row.verdict, row.reason = REFUSED, str(error)
        row.expected = bool(network.refusal) and network.refusal in str(error)
    except FAILURES as error:
        row.reason = told(error)
    row.seconds = time.perf_counter() - start
    return row


def repaired(network: Network, row: Row) -> str:
    """What dpfix does: trains with noise, takes an empty draw and a single sample, and releases the right sum."""
    model = built(network)
    plain = copy.deepcopy(model)
    made, training = with_dpfix(
        network, model, loader_of(network, network.samples, network.samples // 3), noise_multiplier=1.0
    )
    describe(row, training.report)
    before = [p.detach().clone() for p in made.model.parameters()]
    ratios = [*train(network, made, ordinary, plain), *train(network, made, ordinary, plain)]
    row.step = statistics.median(ratios[1:])
    train(network, made, with_empty)
    train(network, made, with_single)
    after = list(made.model.parameters())
    if not all(bool(p.isfinite().all()) for p in after):
        row.reason = "a parameter is not finite after training"
        return WRONG
    if any(p.requires_grad and torch.equal(p, b) for p, b in zip(after, before, strict=True)):
        row.reason = "a parameter did not move, so it got no noise"
        return WRONG
    row.dtype = str(network.dtype).removeprefix("torch.")
    row.error = exact_error(network, training.plan.engine)
    row.expected = row.error <= LARGEST_ERROR[network.dtype] and not network.refusal
    row.reason = "" if row.expected else "the released sum is not the sum of clipped gradients"
    return EXACT if row.expected else WRONG


def exact_error(network: Network, engine: str) -> float:
    """The released sum without noise, computed by the engine that trained."""
    model = definite(built(network)).to(network.dtype)
    loader = loader_of(network, SAMPLES, SAMPLES, network.dtype)
    arguments = {"noise_multiplier": 0.0, "poisson_sampling": False, "grad_sample_mode": engine}
    made, _ = with_dpfix(network, model, loader, **arguments)
    return released_error(network, made, loader.dataset)  # type: ignore[arg-type]


def describe(row: Row, report: Any) -> None:
    row.found = dict(Counter(f.code for f in report.findings))
    row.repaired = sorted({f.code for f in report.repairs})
    row.changed = sorted({f.code for f in report.repairs if f.fixability.value == "changes-model"})
    row.engine = report.engine
    row.kept_out = {
        e.engine: short(e.reason, 150) for e in report.evidence if not e.passed and e.engine in {"bookkeeping", "vmap"}
    }


def plain_opacus(network: Network, mode: str) -> Opacus:
    """What plain Opacus does in one of its modes."""
    out = Opacus()
    try:
        made = with_opacus(
            network,
            built(network),
            loader_of(network, network.samples, network.samples // 3),
            noise_multiplier=1.0,
            grad_sample_mode=mode,
        )
        train(network, made, ordinary)
    except FAILURES as error:
        out.stops = told(error)
        return out
    try:
        train(network, made, with_empty)
    except FAILURES as error:
        out.empty = told(error)
    model, loader = definite(built(network)).to(network.dtype), loader_of(network, SAMPLES, SAMPLES, network.dtype)
    try:
        made = with_opacus(network, model, loader, noise_multiplier=0.0, poisson_sampling=False, grad_sample_mode=mode)
        out.error = released_error(network, made, loader.dataset)  # type: ignore[arg-type]
    except FAILURES:  # a layer that works in float32 only, or BatchNorm of a single value
        out.error = None
    return out


def told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def missing(error: Exception) -> str:
    """Which package an import needs."""
    text = str(error)
    package = next((p for p in ("torchvision", "nvsubquadratic", "transformers", "einops") if p in text), text[:80])
    return f"needs {package}, which is not installed"


def quiet() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


# ------------------------------------------------------------------ all networks


def in_a_process(network: Network, timeout: float) -> Row:
    """Measure a network in a process of its own, for as long as is allowed."""
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_measure_and_send, args=(network.name, theirs))
    process.start()
    theirs.close()
    try:
        if ours.poll(timeout):
            return ours.recv()
        return Row(network.name, network.task, reason=f"no result after {timeout:.0f} s")
    except EOFError:
        return Row(network.name, network.task, reason=f"the process ended with {process.exitcode}")
    finally:
        process.terminate()
        process.join()


def _measure_and_send(name: str, pipe: Any) -> None:
    quiet()
    pipe.send(measure(next(n for n in NETWORKS if n.name == name)))


def run(only: str, jobs: int, timeout: float) -> list[Row]:
    """All rows, in the order of the table; progress goes to stderr."""

    def one(network: Network) -> Row:
        if network.heavy and only.lower() != network.name.lower():
            return Row(network.name, network.task, SKIPPED, network.heavy, expected=True)
        return in_a_process(network, timeout)

    chosen = [n for n in NETWORKS if only.lower() in n.name.lower()]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["zoo_networks", "dpfix", "opacus"])
    with ThreadPoolExecutor(jobs) as pool:
        rows = []
        for row in pool.map(one, chosen):
            print(f"{row.name}: {verdict(row)} ({row.seconds:.0f} s)", file=sys.stderr, flush=True)
            rows.append(row)
    return rows


# ------------------------------------------------------------------ the table


def lines(rows: Sequence[Row]) -> Iterator[str]:
    """The table."""
    yield "| network | Opacus, `hooks` | Opacus, `functorch` | dpfix found | engine | step | dpfix |"
    yield "|---|---|---|---|---|---|---|"
    task = ""
    for row in rows:
        if row.task != task:
            task = row.task
            yield f"| **{task}** | | | | | | |"
        yield (
            f"| {row.name} | {' | '.join(opacus_cell(row, mode) for mode in MODES)} | {found(row)} "
            f"| {row.engine and f'`{row.engine}`'} | {'' if row.step is None else f'{row.step:.1f}'} | {verdict(row)} |"
        )


def opacus_cell(row: Row, mode: str) -> str:
    if mode not in row.opacus:
        return ""
    cell = row.opacus[mode]
    if cell.stops:
        return f"stops: `{short(cell.stops)}`"
    wrong = cell.error is not None and cell.error > LARGEST_ERROR[torch.float32]
    text = f"**silent** error {cell.error:.0e}" if wrong else "trains"
    return f"{text}; empty draw: `{short(cell.empty)}`" if cell.empty else text


def found(row: Row) -> str:
    """The codes, with a star where the repair computes another function and brackets where there was none."""

    def one(code: str, count: int) -> str:
        text = code + ("*" if code in row.changed else "") + (f" x{count}" if count > 1 else "")
        return text if code in row.repaired else f"({text})"

    return ", ".join(one(c, n) for c, n in sorted(row.found.items()))


def verdict(row: Row) -> str:
    if row.verdict == EXACT:
        return f"exact, error {row.error:.0e}"
    strong = "" if row.expected else "**"
    return f"{strong}{row.verdict}{strong}: {short(row.reason, 160)}"


def short(text: str, length: int = 60) -> str:
    text = " ".join(text.split()).replace("|", "/").replace("`", "'")
    return text if len(text) <= length else text[: length - 4] + " ..."


def summary(rows: Sequence[Row]) -> str:
    """The numbers below the table."""
    counted = [r for r in rows if r.verdict != SKIPPED]
    trained = {m: [r for r in counted if m in r.opacus and not r.opacus[m].stops] for m in MODES}
    either = {r.name for found in trained.values() for r in found}
    verdicts, engines = Counter(r.verdict for r in counted), Counter(r.engine for r in counted if r.verdict == EXACT)
    steps = {e: [r.step for r in counted if r.engine == e and r.step is not None] for e in engines}
    text = [f"{len(counted)} configurations, {len(rows) - len(counted)} skipped."]
    for mode, those in trained.items():
        silent = sum((r.opacus[mode].error or 0) > LARGEST_ERROR[torch.float32] for r in those)
        empty = sum(bool(r.opacus[mode].empty) for r in those)
        text.append(f"Plain Opacus with `{mode}` trains {len(those)}; {silent} of these release a wrong sum without a word, "
                    f"and {empty} stop at an empty draw.")  # fmt: skip
    text.append(f"With one of both it trains {len(either)}.")
    text.append("dpfix: " + ", ".join(f"{n} {v}" for v, n in verdicts.items()) + ".")
    told = [f"{n} on `{e}` (a step takes {statistics.median(steps[e]):.1f} times a non-private one)"
            for e, n in engines.most_common()]  # fmt: skip
    return " ".join(text) + (f" Engines: {', '.join(told)}." if told else "")


def by_sample(rows: Sequence[Row]) -> Iterator[str]:
    """The networks that are trained in batches of one, and what kept dpfix's other engines out."""
    for row in rows:
        if row.verdict == EXACT and row.engine == "microbatch":
            yield f"- {row.name}: " + "; ".join(f"`{n}` is not used: {reason}" for n, reason in row.kept_out.items())


def variants() -> str:
    """Classes without a row of their own."""
    return "; ".join(f"{', '.join(classes)} by {name}" for name, classes in STANDS_FOR.items())


def environment() -> dict[str, Any]:
    packages = ("torch", "opacus", "monai", "dpfix")
    return {
        **{name: metadata.version(name).partition("+")[0] for name in packages},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": 1,
    }


def write(rows: Sequence[Row]) -> None:
    """Put the results into ``benchmarks/results/zoo.json`` and the table into ``docs/zoo.md``."""
    results = ROOT / "benchmarks/results/zoo.json"
    results.parent.mkdir(exist_ok=True)
    told = ",\n".join(json.dumps(asdict(row)) for row in rows)
    results.write_text(f'{{"environment": {json.dumps(environment())},\n"rows": [\n{told}\n]}}\n')
    (ROOT / "docs/zoo.md").write_text(
        PAGE.format(
            table="\n".join(lines(rows)),
            summary=summary(rows),
            by_sample="\n".join(by_sample(rows)),
            variants=variants(),
            **environment(),
        )
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="networks whose name contains this text")
    parser.add_argument("--jobs", type=int, default=1, help="networks at a time")
    parser.add_argument("--timeout", type=float, default=600, help="seconds per network")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/zoo.json and docs/zoo.md")
    arguments = parser.parse_args()
    rows = run(arguments.only, arguments.jobs, arguments.timeout)
    print("\n".join(lines(rows)), summary(rows), "\n".join(by_sample(rows)), sep="\n\n")
    if arguments.write:
        write(rows)
    return int(not all(row.expected for row in rows))


PAGE = """\
# The networks of MONAI

Written by `make zoo` (`python benchmarks/zoo.py --write`) with torch {torch}, opacus {opacus}, monai {monai}, on one CPU thread.

Every trainable network of `monai.networks.nets`, small, with the loss it is made for. Both libraries train it with noise on
Poisson draws; plain Opacus gets the model after `ModuleValidator.fix`.

- **exact**: it trained, an empty draw and a single sample included, and the sum released without noise equals the sum of
  clipped gradients taken one sample at a time with ordinary autograd. The error is the largest of a parameter, relative to
  its norm, in float64 where the network takes it.
- **silent**: plain Opacus raises nothing, and the sum it releases is another one.
- **empty draw**: Poisson sampling draws no sample now and then; the error with which plain Opacus ends there.
- **dpfix found**: [codes](rules/index.md) of the findings; in brackets those that need no repair. With a star, the repair
  changes the function that the model computes.
- **step**: time of a private step over that of a non-private one, on the same batches of eight samples on average, four
  for large networks. dpfix times the engines that are right and takes the fastest, so another machine may show another
  name; `microbatch` is taken only where no other engine is right.

{summary}

{table}

Classes that differ in the number of layers only, or are a base class, are represented: {variants}.

## On `microbatch`

Networks that are trained in batches of one, and what kept the other engines of dpfix out:

{by_sample}
"""

if __name__ == "__main__":
    sys.exit(main())

"""One network: trained by both libraries, and the sum that each releases."""

from __future__ import annotations

import copy
import math
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from opacus.validators import ModuleValidator
from torch import Generator, Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader

import dpfix
from benchmarks.common import tables
from benchmarks.common.libraries import FAILURES, Made, sgd, with_dpfix, with_opacus
from benchmarks.common.released import Gradients, clipped_sum, drawn_after, gradient, norm, released
from benchmarks.zoo.network import Network

LR = 0.01
SAMPLES = 4
"""Samples of which the released sum is compared."""
LARGEST_ERROR = {torch.float64: 1e-6, torch.float32: 2e-3}
"""Relative error that is still rounding."""
EXACT, REFUSED, WRONG, STOPS, SKIPPED = "exact", "refused", "wrong", "stops", "skipped"
MODES = ("hooks", "functorch")
CHANCE = ("p", "dropout", "drop_prob", "dropout_p", "drop_rate", "layerdrop", "mask_time_prob", "mask_feature_prob")
"""Attributes of a module or its settings that say how often something is left out by chance."""
NOTHING = 1e9
"""A clip norm that clips nothing."""


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


def through_dpfix(network: Network, model: nn.Module, loader: DataLoader[Any], **arguments: Any) -> Made:
    step = steady(network) if arguments.get("noise_multiplier") == 0 else network.loss
    return with_dpfix(model, loader, LR, step, cache=False, **arguments)


def through_opacus(model: nn.Module, loader: DataLoader[Any], **arguments: Any) -> Made:
    dtype = next(model.parameters()).dtype
    # the layers that it puts in come in single precision
    return with_opacus(ModuleValidator.fix(model).to(dtype), loader, LR, **arguments)


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
    next(seed for seed in range(100_000) if wanted(sizes(made.loader, seed)))  # the loader is left at that seed
    optimizer = None if plain is None else sgd(plain, LR)
    ratios = []
    for batch in made.loader:
        private = timed(network, made.model, made.optimizer, batch)
        if plain is not None:
            ratios.append(private / timed(network, plain, optimizer, batch))
    return ratios


def sizes(loader: DataLoader[Any], seed: int) -> list[int]:
    """Sizes of the batches that a pass draws after a seed."""
    return [len(batch) for batch in drawn_after(loader, seed)]


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
        for owner in (module, getattr(module, "config", None)):
            for name in CHANCE:
                if isinstance(getattr(owner, name, None), float):
                    setattr(owner, name, 0.0)
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
    made = through_dpfix(
        network, model, loader_of(network, network.samples, network.samples // 3), noise_multiplier=1.0
    )
    describe(row, made.report)
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
    row.error = exact_error(network, made.engine)
    row.expected = row.error <= LARGEST_ERROR[network.dtype] and not network.refusal
    row.reason = "" if row.expected else "the released sum is not the sum of clipped gradients"
    return EXACT if row.expected else WRONG


def exact_error(network: Network, engine: str) -> float:
    """The released sum without noise, computed by the engine that trained."""
    model = definite(built(network)).to(network.dtype)
    loader = loader_of(network, SAMPLES, SAMPLES, network.dtype)
    arguments = {"noise_multiplier": 0.0, "poisson_sampling": False, "grad_sample_mode": engine}
    made = through_dpfix(network, model, loader, **arguments)
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
        made = through_opacus(
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
        made = through_opacus(model, loader, noise_multiplier=0.0, poisson_sampling=False, grad_sample_mode=mode)
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


def short(text: str, length: int = 60) -> str:
    """For a cell of the table, where it stands in backticks."""
    return tables.short(text.replace("`", "'"), length)

"""What a private step costs on several processes, beside torch's ``DistributedDataParallel`` without privacy.

``python -m benchmarks.ranks_cost [--models MLP ...] [--processes 1 2 4] [--rounds 9] [--write docs/ranks.md]``

The batch of a model is shared out among 1, 2 and 4 processes (``gloo``), each with one thread. *step*: seconds on the wall
of the slowest rank, median of the rounds. *exchange*: what a step sends to add up the gradients or the clipped sums, counted
in a step, and its seconds when all ranks begin it together and have nothing else to do; torch's wrapper sends while
``backward`` runs, so that a part of it takes no time of its own. *peak*: largest number of bytes that tensors of a rank hold
during a warm step. *as one process*: without noise, how far what is released is from what one process releases of the same
batch: the largest difference in a parameter, relative to the largest number in it.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import dpfix
from benchmarks.common import tables
from benchmarks.common.contests import CONTESTS, Batch
from benchmarks.common.cost import FLOAT
from benchmarks.common.process import on_ranks, peak_bytes, wall_seconds

MODELS = ("MLP", "CNN", "transformer")
KINDS = ("ordinary", "private")
FEW = 5
"""Rounds in which an exchange is repeated."""
Step = Callable[[nn.Module, Any], Tensor]
"""A training step: from model and batch to the loss."""


@dataclass(frozen=True)
class Seen:
    """What one rank has measured of one training.

    Attributes:
        steps: seconds of every round.
        sent: bytes of every message of a step.
        exchange: seconds of these messages alone, in every round.
        others: further messages of a step.
        peak: bytes.
        released: what is released without noise, by parameter.
        parameters: how many numbers are trained.
    """

    steps: list[float]
    sent: list[int]
    exchange: list[float]
    others: int
    peak: int
    released: dict[str, Tensor]
    parameters: int


# ------------------------------------------------------------------ on every rank


def on_rank(rank: int, size: int, folder: Path, name: str, kind: str, rounds: int) -> Seen:
    """What one rank of a training has seen."""
    return (private if kind == "private" else ordinary)(name, rank, size, rounds)


def made(name: str, rank: int, size: int) -> tuple[nn.Module, Batch, Batch]:
    """A model, in torch's wrapper if there are several ranks, the whole batch, and the part of it that is this rank's."""
    contest = CONTESTS[name]
    torch.manual_seed(0)
    model = contest.model().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):  # its masks would be others on every rank
            module.p = 0.0
    data = contest.batch(contest.size)
    return DistributedDataParallel(model) if size > 1 else model, data, tuple(t[rank::size] for t in data)


def stepping(name: str, model: nn.Module, optimizer: Any, part: Batch) -> Callable[[], None]:
    def step() -> None:
        optimizer.zero_grad()
        CONTESTS[name].step(model, part).backward()
        optimizer.step()

    return step


def ordinary(name: str, rank: int, size: int, rounds: int) -> Seen:
    model, _, part = made(name, rank, size)
    sent: list[int] = []

    def counted(state, bucket):  # torch compares annotations with its own classes
        sent.append(bucket.buffer().nbytes)
        return allreduce_hook(state, bucket)

    if isinstance(model, DistributedDataParallel):
        model.register_comm_hook(None, counted)
    step = stepping(name, model, torch.optim.SGD(model.parameters(), lr=1e-3), part)
    for _ in range(2):  # the wrapper shares its buckets out anew after the first one
        step()
    sent.clear()
    step()
    counts = list(sent)
    buckets = [torch.zeros(count // FLOAT) for count in counts]

    def exchange() -> None:
        for bucket in buckets:
            distributed.all_reduce(bucket)

    times, alone = together(step, size, rounds), together(exchange, size, FEW)
    buckets.clear()
    return Seen(times, counts, alone, 0, peak_bytes(step), {}, trained(model))


def private(name: str, rank: int, size: int, rounds: int) -> Seen:
    model, data, part = made(name, rank, size)
    training = call(model, data, CONTESTS[name].step, rank, size)
    optimizer = training[1]
    step = stepping(name, training[0], optimizer, part)
    optimizer.noise_multiplier = 0.0
    step()
    inside = model.module if size > 1 else model
    released = io.BytesIO()  # no tensors while the peak is measured
    torch.save({n: p.grad for n, p in inside.named_parameters() if p.grad is not None} if rank == 0 else {}, released)
    optimizer.noise_multiplier = 1.0
    step()
    optimizer.guard.real_steps.agenda.due = lambda seen: (
        False
    )  # benchmarks.audit_cost measures the steps that are checked
    with counting() as (sums, others):
        step()
    exchange = optimizer.reduce_gradients if size > 1 else int
    times, alone = together(step, size, rounds), together(exchange, size, FEW)
    return Seen(
        times, sums, alone, len(others), peak_bytes(step), torch.load(io.BytesIO(released.getvalue())), trained(model)
    )


def call(model: nn.Module, data: Batch, step: Step, rank: int = 0, size: int = 1) -> dpfix.PrivateTraining:
    """The call, with a loader that has the whole batch in one piece."""
    samples = TensorDataset(*data)
    sampler = DistributedSampler(samples, size, rank, shuffle=False, drop_last=True) if size > 1 else None
    return dpfix.make_private_safe(
        module=model, optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3),
        data_loader=DataLoader(samples, batch_size=len(samples) // size, sampler=sampler), max_grad_norm=1.0,
        training_step=step, poisson_sampling=False, grad_sample_mode="bookkeeping", cache=False,
        noise_multiplier=1.0,
    )  # fmt: skip


@contextmanager
def counting() -> Iterator[tuple[list[int], list[int]]]:
    """The bytes of every message that is sent inside: sums, and the others."""
    sums, others = list[int](), list[int]()
    before = distributed.all_reduce, distributed.all_gather

    def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sums.append(tensor.nbytes)
        return before[0](tensor, *args, **kwargs)

    def all_gather(found: list[Tensor], tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        others.append(tensor.nbytes)
        return before[1](found, tensor, *args, **kwargs)

    distributed.all_reduce, distributed.all_gather = all_reduce, all_gather
    try:
        yield sums, others
    finally:
        distributed.all_reduce, distributed.all_gather = before


def together(work: Callable[[], Any], size: int, rounds: int) -> list[float]:
    """Seconds of some work which all ranks begin together, in every round."""
    found = []
    for _ in range(rounds):
        if size > 1:
            distributed.barrier()
        found.append(wall_seconds(work))
    return found


def trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


# ------------------------------------------------------------------ all ranks together


def slowest(rounds: Sequence[Sequence[float]]) -> float:
    """The median over the rounds of the slowest rank's seconds."""
    return statistics.median(max(of) for of in zip(*rounds, strict=True))


def difference(here: dict[str, Tensor], there: dict[str, Tensor]) -> float:
    """The largest difference in a parameter, relative to the largest number in it."""
    assert here.keys() == there.keys() and here
    return max(float((here[n] - t).abs().max() / t.abs().max().clamp_(min=1e-30)) for n, t in there.items())


def exchanged(seen: list[Seen]) -> str:
    """Messages, bytes and seconds of an exchange."""
    if not seen[0].sent:
        return ""
    megabytes = sum(seen[0].sent) / 1e6
    others = f" + {seen[0].others}" if seen[0].others else ""
    return f"{len(seen[0].sent)}{others}; {megabytes:.2f} MB; {1e3 * slowest([s.exchange for s in seen]):.1f} ms"


def rows(name: str, sizes: Sequence[int], rounds: int) -> Iterator[str]:
    """The lines of one model."""
    alone: dict[str, Tensor] = {}
    for size in sizes:
        seen = {kind: on_ranks(on_rank, size, name, kind, rounds) for kind in KINDS}
        steps = {kind: slowest([s.steps for s in seen[kind]]) for kind in KINDS}
        peaks = {kind: max(s.peak for s in seen[kind]) / 1e6 for kind in KINDS}
        there = seen["private"][0].released
        alone = alone or there
        yield tables.row(
            f"{name}, B={CONTESTS[name].size}, {seen['private'][0].parameters:,}", size,
            f"{1e3 * steps['ordinary']:.0f} ms", exchanged(seen["ordinary"]),
            f"{1e3 * steps['private']:.0f} ms", exchanged(seen["private"]),
            f"{peaks['ordinary']:.0f} -> {peaks['private']:.0f} MB",
            f"{difference(there, alone):.0e}" if size > sizes[0] else "",
        )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(CONTESTS), default=MODELS)
    parser.add_argument("--processes", nargs="+", type=int, default=(1, 2, 4))
    parser.add_argument("--rounds", type=int, default=9, help="rounds of which the median is taken")
    parser.add_argument("--write", type=Path, help="page whose table is replaced")
    given = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    shared = f"{cores} core{'s' if cores > 1 else ''} shared by the processes, one thread each"
    last = ["", f"{shared}; gloo, float32, torch {torch.__version__}; the engine is `bookkeeping`."]
    lines = tables.head(
        "model, batch, trained numbers", "processes", "ordinary step", "its exchange", "private step", "its exchange",
        "peak of a rank", "as one process",
    )  # fmt: skip
    print("\n".join(lines), flush=True)
    for name in given.models:
        for line in rows(name, given.processes, given.rounds):
            print(line, flush=True)
            lines.append(line)
        if given.write:
            tables.write(given.write, lines + last)
    print("\n".join(last))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

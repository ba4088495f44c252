"""Memory and time of a step of a model that ``fully_shard`` has spread over processes, with privacy and without.

``python -m benchmarks.fsdp_memory [--models deep ...] [--processes 1 2 4] [--rounds 9] [--write docs/sharded.md]``

A batch is shared out among 1, 2 and 4 processes (``gloo``), one thread each; one process has the plain model. *peak*: largest
number of bytes that tensors of a rank hold during a warm step, on the rank with most. *step*: seconds on the wall of the
slowest rank, median of the rounds. *ordinary*: FSDP2 without privacy. *dpfix*: ``make_private_safe``, steps that are not
checked, and *checked* the peak of one that is. *Opacus*: ``grad_sample_mode="ghost_fsdp"`` with ``FSDP2Wrapper``.
*error*: without noise, how far the released sum is from that of batches of one, relative to its norm.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from opacus import PrivacyEngine
from opacus.utils.fsdp_utils import FSDP2Wrapper
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import dpfix
from benchmarks.common import tables
from benchmarks.common.process import on_ranks, peak_bytes, wall_seconds

SAMPLES, CLIP, RATE = 16, 1.0, 1.0
WIDTH, DEPTH = 768, 12


def deep() -> nn.Module:
    """Layers whose weights are much larger than what they are applied to."""
    layers = (nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()) for _ in range(DEPTH))
    return nn.Sequential(*layers, nn.Linear(WIDTH, 10))


class Block(nn.Module):
    """A block of a transformer, of layers that Opacus knows as well."""

    def __init__(self, width: int = 256, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.before(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.after(x))))


class Transformer(nn.Module):
    def __init__(self, blocks: int = 8) -> None:
        super().__init__()
        self.first = nn.Linear(16, 256)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "deep": (deep, (WIDTH,)),
    "transformer": (Transformer, (16, 16)),
}
"""Name -> model, shape of a sample."""
KINDS = ("ordinary", "dpfix", "Opacus")


def step_of(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def data(name: str) -> TensorDataset:
    g = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(SAMPLES, *MODELS[name][1], generator=g), torch.arange(SAMPLES) % 10)


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name][0]()


def spread(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for child in getattr(model, "blocks", model.children()):
        fully_shard(child, mesh=mesh)
    return fully_shard(model, mesh=mesh)


# ------------------------------------------------------------------ on every rank


def on_rank(rank: int, size: int, folder: Path, name: str, kind: str, rounds: int) -> dict[str, Any]:
    """What one rank of a training has seen, the first with the released sum."""
    measure = {"ordinary": ordinary, "dpfix": private, "Opacus": opacus}[kind]
    released = folder / f"{rank}.released"
    seen = measure(name, rank, size, rounds, released)
    return seen | ({"released": torch.load(released)} if rank == 0 and released.exists() else {})


def loader_of(name: str, rank: int, size: int) -> DataLoader[Any]:
    samples = data(name)
    sampler = DistributedSampler(samples, size, rank, shuffle=False, drop_last=True) if size > 1 else None
    return DataLoader(samples, batch_size=SAMPLES // size, sampler=sampler)


def measured(step: Callable[[], None], size: int, rounds: int) -> dict[str, Any]:
    times = []
    for _ in range(rounds):
        if size > 1:
            distributed.barrier()
        times.append(wall_seconds(step))
    return {"times": times, "peak": peak_bytes(step)}


def ordinary(name: str, rank: int, size: int, rounds: int, released: Path) -> dict[str, Any]:
    model = made(name) if size == 1 else spread(made(name))
    batch = next(iter(loader_of(name, rank, size)))
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)

    def step() -> None:
        optimizer.zero_grad()
        step_of(model, batch).backward()
        optimizer.step()

    return measured(step, size, rounds)


def whole(model: nn.Module) -> dict[str, Tensor]:
    state = ((n.removeprefix("_module."), p.detach()) for n, p in model.named_parameters())
    return {n: p.full_tensor() if isinstance(p, DTensor) else p.clone() for n, p in state}


def moved(model: nn.Module, step: Callable[[], None]) -> dict[str, Tensor]:
    """What a step without noise has released, by parameter."""
    before = whole(model)
    step()
    after = whole(model)
    return {n: (before[n] - after[n]) * SAMPLES / RATE for n in before}


def slowly(optimizer: Any) -> None:
    """From here on with noise, and with small steps."""
    optimizer.noise_multiplier = 1.0
    for group in optimizer.param_groups:
        group["lr"] = 1e-3


def private(name: str, rank: int, size: int, rounds: int, released: Path) -> dict[str, Any]:
    model = made(name) if size == 1 else spread(made(name))
    private_model, optimizer, loader = dpfix.make_private_safe(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=RATE), data_loader=loader_of(name, rank, size),
        noise_multiplier=0.0, max_grad_norm=CLIP, training_step=step_of, poisson_sampling=False,
        grad_sample_mode="bookkeeping", cache=False,
    )  # fmt: skip
    batch = next(iter(loader))

    def step() -> None:
        optimizer.zero_grad()
        step_of(private_model, batch).backward()
        optimizer.step()

    torch.save(moved(model, step), released)
    slowly(optimizer)
    optimizer.guard.real_steps.agenda.due = lambda seen: True
    checked = peak_bytes(step)
    optimizer.guard.real_steps.agenda.due = lambda seen: False
    step()
    return measured(step, size, rounds) | {"checked": checked}


def opacus(name: str, rank: int, size: int, rounds: int, released: Path) -> dict[str, Any]:
    model = made(name) if size == 1 else FSDP2Wrapper(made(name), mesh=init_device_mesh("cpu", (size,)))
    dp_model, optimizer, criterion, loader = PrivacyEngine().make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=RATE), data_loader=loader_of(name, rank, size),
        criterion=nn.CrossEntropyLoss(), noise_multiplier=0.0, max_grad_norm=CLIP, poisson_sampling=False,
        grad_sample_mode="ghost" if size == 1 else "ghost_fsdp",
    )  # fmt: skip
    batch = next(iter(loader))

    def step() -> None:
        optimizer.zero_grad()
        criterion(dp_model(batch[0]), batch[1]).backward()
        optimizer.step()

    torch.save(moved(model, step), released)
    slowly(optimizer)
    return measured(step, size, rounds)


# ------------------------------------------------------------------ all ranks together


def due(name: str) -> dict[str, Tensor]:
    """The clipped sum of the batch, from batches of one."""
    model = made(name)
    total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for x, y in data(name):
        gradients = torch.autograd.grad(step_of(model, (x[None], y[None])), list(model.parameters()))
        norm = torch.stack([g.norm() for g in gradients]).norm()
        for n, g in zip(total, gradients, strict=True):
            total[n] += g * min(1.0, CLIP / float(norm))
    return total


def error(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    gap = torch.stack([(found[n] - t).norm() for n, t in wanted.items()]).norm()
    return float(gap / torch.stack([t.norm() for t in wanted.values()]).norm())


def cell(seen: list[dict[str, Any]], wanted: dict[str, Tensor]) -> str:
    seconds = statistics.median(max(of) for of in zip(*(s["times"] for s in seen), strict=True))
    text = f"{max(s['peak'] for s in seen) / 1e6:.0f} MB; {1e3 * seconds:.0f} ms"
    if "checked" in seen[0]:
        text += f"; checked {max(s['checked'] for s in seen) / 1e6:.0f} MB"
    return text + (f"; error {error(seen[0]['released'], wanted):.0e}" if "released" in seen[0] else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--processes", nargs="+", type=int, default=(1, 2, 4))
    parser.add_argument("--rounds", type=int, default=9, help="rounds of which the median is taken")
    parser.add_argument("--write", type=Path, help="page whose table is replaced")
    given = parser.parse_args()
    lines = tables.head("model, weights", "processes", "ordinary", "dpfix", "Opacus")
    print("\n".join(lines), flush=True)
    for name in given.models:
        wanted = due(name)
        size_of = sum(p.numel() for p in made(name).parameters()) * 4 / 1e6
        for size in given.processes:
            cells = [cell(on_ranks(on_rank, size, name, kind, given.rounds), wanted) for kind in KINDS]
            lines.append(tables.row(f"{name}, {size_of:.0f} MB", size, *cells))
            print(lines[-1], flush=True)
    lines += ["", f"Batch {SAMPLES}, gloo on the processor, float32, torch {torch.__version__}; peak, step, error."]
    print("\n".join(lines[-2:]))
    if given.write:
        tables.write(given.write, lines)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

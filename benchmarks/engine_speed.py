"""Time and memory of a private training step, as multiples of an ordinary one.

``python benchmarks/engine_speed.py [--engines bookkeeping hooks] [--models CNN ...] [--rounds 7] [--json FILE]``

*step*: process CPU time on one thread of forward, backward and optimizer step, medians of rounds in which the ordinary
step (SGD on the same repaired model) and all engines take turns in one process. *memory*: largest number of bytes
that tensors hold during a warm step, every contestant in a process of its own. The private step is the whole one:
clipping, noise, Opacus's optimizer and accountant.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import multiprocessing
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.data import DataLoader, TensorDataset

import dpfix

ORDINARY = "non-private"


# ------------------------------------------------------------------ the models


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(n, t, d))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.a, self.n1, self.n2 = Attention(width, heads), nn.LayerNorm(width), nn.LayerNorm(width)
        self.m = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a(self.n1(x))
        return x + self.m(self.n2(x))


class Transformer(nn.Module):
    def __init__(self, vocabulary: int = 10_000, width: int = 256, layers: int = 4, length: int = 128) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, 8) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x) + self.positions(torch.arange(x.shape[1]))
        return self.head(self.norm(self.blocks(x)))


class Residual(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.c2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.n1, self.n2 = nn.GroupNorm(32, outside), nn.GroupNorm(32, outside)
        same = inside == outside and stride == 1
        down = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.GroupNorm(32, outside))
        self.down = nn.Identity() if same else down

    def forward(self, x: Tensor) -> Tensor:
        y = self.n2(self.c2(F.relu(self.n1(self.c1(x)))))
        return F.relu(y + self.down(x))


class ResNet18(nn.Sequential):
    def __init__(self) -> None:
        plan = [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2)]
        super().__init__(
            nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.GroupNorm(32, 64), nn.ReLU(),
            *(Residual(*p) for p in plan), Residual(512, 512, 1),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10),
        )  # fmt: skip


class CharLSTM(nn.Module):
    def __init__(self, vocabulary: int = 80, width: int = 64, hidden: int = 256) -> None:
        super().__init__()
        self.e, self.l = nn.Embedding(vocabulary, width), nn.LSTM(width, hidden, batch_first=True)
        self.h = nn.Linear(hidden, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        return self.h(self.l(self.e(x))[0])


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 8, 2, 3), nn.ReLU(), nn.MaxPool2d(2, 1),
        nn.Conv2d(16, 32, 4, 2), nn.ReLU(), nn.MaxPool2d(2, 1),
        nn.Flatten(), nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))


def unet() -> nn.Module:
    from monai.networks.nets import UNet

    return UNet(3, 1, 2, (16, 32, 64), (2, 2), num_res_units=2)


def vnet() -> nn.Module:
    from monai.networks.nets import VNet

    return VNet(3, 1, 2, dropout_prob_down=0.0, dropout_prob_up=(0.0, 0.0))


def tokens(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def classes(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@dataclass(frozen=True)
class Contest:
    """A model, one batch of its data, and the loop's training step."""

    model: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]
    step: Callable[[nn.Module, Any], Tensor]


def labels(classes: int, *shape: int) -> Tensor:
    return torch.randint(0, classes, shape)


CONTESTS: dict[str, Contest] = {
    "MLP": Contest(mlp, lambda: (torch.randn(256, 784), labels(10, 256)), classes),
    "CNN": Contest(cnn, lambda: (torch.randn(256, 1, 28, 28), labels(10, 256)), classes),
    "transformer": Contest(Transformer, lambda: (labels(10_000, 16, 128), labels(10_000, 16, 128)), tokens),
    "ResNet18-GN": Contest(ResNet18, lambda: (torch.randn(32, 3, 32, 32), labels(10, 32)), classes),
    "UNet 3D": Contest(unet, lambda: (torch.randn(4, 1, 32, 32, 32), labels(2, 4, 32, 32, 32)), classes),
    "VNet": Contest(vnet, lambda: (torch.randn(2, 1, 32, 32, 32), labels(2, 2, 32, 32, 32)), classes),
    "char LSTM": Contest(CharLSTM, lambda: (labels(80, 64, 64), labels(80, 64, 64)), tokens),
}


# ------------------------------------------------------------------ the steps


def stepper(name: str, engine: str) -> tuple[Callable[[], None], str]:
    """One training step of a contestant, and the engine that was really used."""
    contest = CONTESTS[name]
    torch.manual_seed(0)
    model, data = contest.model().train(), contest.batch()
    sgd = torch.optim.SGD(model.parameters(), lr=1e-3)
    loader = DataLoader(TensorDataset(*data), batch_size=len(data[0]))
    mode = "auto" if engine == ORDINARY else engine
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        training = dpfix.make_private_safe(
            module=model, optimizer=sgd, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0,
            training_step=contest.step, poisson_sampling=False, grad_sample_mode=mode,
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


def seconds(step: Callable[[], None]) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def step_times(name: str, engines: Sequence[str], rounds: int) -> dict[str, float]:
    """Median CPU seconds of a step, the contestants taking turns."""
    steps = {engine: stepper(name, engine)[0] for engine in (ORDINARY, *engines)}
    for step in steps.values():
        step()
    found: dict[str, list[float]] = {engine: [] for engine in steps}
    for _ in range(rounds):
        for engine, step in steps.items():
            found[engine].append(seconds(step))
    return {engine: statistics.median(times) for engine, times in found.items()}


def live_bytes() -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in gc.get_objects() if is_tensor(t)}
    return sum(storages.values())


def is_tensor(thing: Any) -> bool:
    return issubclass(type(thing), Tensor)


def peak_bytes(name: str, engine: str) -> int:
    """Largest number of bytes that tensors hold during a warm step."""
    step, _ = stepper(name, engine)
    step()
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()  # what the step before left behind is freed here, which the profiler does not see
        with record_function("warm step"):
            step()
    gc.collect()
    events = sorted(recorded.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    start = next(e.start_ns() for e in events if e.name() == "warm step")
    present = peak = 0
    for event in events:
        if event.name() == "[memory]":
            present += event.nbytes()
            peak = max(peak, present) if event.start_ns() >= start else present
    return live_bytes() + peak - present


def in_a_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    with multiprocessing.get_context("spawn").Pool(1, one_thread) as pool:
        return pool.apply(function, arguments)


def one_thread() -> None:
    torch.set_num_threads(1)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", default=["bookkeeping"])
    parser.add_argument("--models", nargs="+", default=list(CONTESTS), choices=list(CONTESTS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    results: dict[str, Any] = {}
    print("| model | " + " | ".join(given.engines) + " |\n|---|" + "---|" * len(given.engines))
    for name in given.models:
        rows: dict[str, Any] = {}
        try:
            times = in_a_fresh_process(step_times, name, given.engines, given.rounds)
        except dpfix.DPFixError as error:
            print(f"| {name} | {type(error).__name__}: {' '.join(str(error).split())[:300]} |", flush=True)
            continue
        rows["seconds"] = times
        if not given.no_memory:
            rows["bytes"] = {e: in_a_fresh_process(peak_bytes, name, e) for e in (ORDINARY, *given.engines)}
        results[name] = rows
        cells = []
        for engine in given.engines:
            cell = f"{times[engine] / times[ORDINARY]:.2f}"
            if "bytes" in rows:
                cell += f" [{rows['bytes'][engine] / rows['bytes'][ORDINARY]:.2f}]"
            cells.append(cell)
        print(f"| {name} ({times[ORDINARY] * 1e3:.0f} ms) | " + " | ".join(cells) + " |", flush=True)
    if given.json:
        about = {"torch": torch.__version__, "machine": platform.processor() or platform.machine(), "threads": 1}
        given.json.write_text(json.dumps({"environment": about, "results": results}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What noise costs from torch's generator and in secure mode, and the proof of the noise in every step.

``python -m benchmarks.noise_cost [--rounds 25] [--write docs/noise.md]``

For an MLP 784-1024-1024-10 with batches of 256 on one thread of a CPU: nanoseconds for one normal number, and the
time of a step, with and without secure mode in turns; of the step, what the check of its noise takes. Medians, without
the first steps of a training, whose noise is judged at once.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

import dpfix
from benchmarks.common import tables
from benchmarks.common.models import classify, mlp
from benchmarks.common.process import cpu_seconds, quiet
from dpfix.sampling.cryptographic import Cryptographic
from dpfix.sampling.randomness import Stream
from dpfix.training.guards.noise import AT_ONCE

NUMBERS = 1_000_000
MODES = {"torch's generator": False, "secure mode": True}


def of_numbers(secure: bool) -> Callable[[], Any]:
    """Adds a million normal numbers to a sum, as a step does."""
    total = torch.zeros(NUMBERS)
    if secure:
        return partial(Cryptographic().add_normal, total, 1.0)
    generator = Stream().generator()
    return lambda: total.add_(torch.normal(0.0, 1.0, total.shape, generator=generator))


class Steps:
    """A private training whose steps are measured, and the check of the noise in them."""

    def __init__(self, secure: bool) -> None:
        model: nn.Module = mlp(1024)
        items = [(torch.randn(784), i % 10) for i in range(1024)]
        self.model, self.optimizer, self.loader = dpfix.make_private_safe(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
            data_loader=DataLoader(items, batch_size=256),  # type: ignore[arg-type]
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            training_step=classify,
            grad_sample_mode="bookkeeping",
            secure_mode=secure,
            cache=False,
        )
        self.batches: Iterator[Any] = itertools.chain.from_iterable(self.loader for _ in itertools.count())
        self.proof = 0.0
        guard = self.optimizer.guard
        for moment in ("_summed", "_noised"):
            checks = getattr(guard, moment)
            setattr(guard, moment, tuple(self._timed(c) if c.__self__ is guard.noise else c for c in checks))

    def _timed(self, check: Callable[..., None]) -> Callable[..., None]:
        def timed(*arguments: Any) -> None:
            self.proof += cpu_seconds(partial(check, *arguments))

        return timed

    def measure(self) -> tuple[float, float]:
        """CPU seconds of a step, and of the proof of its noise."""
        batch = next(self.batches)
        self.proof = 0.0

        def step() -> None:
            self.optimizer.zero_grad()
            classify(self.model, batch).backward()
            self.optimizer.step()

        return cpu_seconds(step), self.proof


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25, help="rounds of which the median is taken")
    parser.add_argument("--write", type=Path, help="page whose table is replaced")
    arguments = parser.parse_args()
    quiet()
    torch.manual_seed(0)
    numbers = {name: of_numbers(secure) for name, secure in MODES.items()}
    trainings = {name: Steps(secure) for name, secure in MODES.items()}
    seconds: dict[str, list[float]] = {name: [] for name in MODES}
    steps: dict[str, list[tuple[float, float]]] = {name: [] for name in MODES}
    for number in range(AT_ONCE + arguments.rounds):
        for name in MODES:
            measured = cpu_seconds(numbers[name]), trainings[name].measure()
            if number >= AT_ONCE:
                seconds[name].append(measured[0])
                steps[name].append(measured[1])
    lines = tables.head("noise from", "ns per number", "private step, ms", "proof of its noise, us", "proof / step")
    for name in MODES:
        whole, proof = (statistics.median(part) for part in zip(*steps[name], strict=True))
        each = 1e9 * statistics.median(seconds[name]) / NUMBERS
        lines.append(
            tables.row(name, f"{each:.1f}", f"{1e3 * whole:.1f}", f"{1e6 * proof:.0f}", f"{proof / whole:.2%}")
        )
    lines += [
        "",
        f"MLP 784-1024-1024-10, B=256, 1,863,690 parameters; CPU time, one thread, torch {torch.__version__}.",
    ]
    print("\n".join(lines))
    if arguments.write:
        tables.write(arguments.write, lines)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

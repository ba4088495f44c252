"""Augmentation multiplicity: what it brings on scikit-learn's digits, and what it costs.

``python -m benchmarks.augmentation_digits [--views 1 4 16] [--seeds 3] [--write docs/augmentation.md]``

*Accuracy*: a small convolutional network trained to the same epsilon with 1, 4 and 16 random views of every sample, and
without augmentation. *Cost*: a step on ``n`` samples of 8 views, beside a private step on ``8 n`` samples of one row and the
ordinary step on the same ``8 n`` rows, in turns in one process; memory in fresh processes. ``--write`` replaces the tables
of a page, and draws the plot beside it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dpfix
from benchmarks import engine_speed as speed
from benchmarks.common import tables
from benchmarks.common.contests import LARGER
from benchmarks.common.digits import accuracy, digits, epoch
from benchmarks.common.process import cpu_seconds, in_a_fresh_process, quiet

TRAINED, BATCH, EPSILON, DELTA, CLIP = 1300, 256, 3.0, 1e-4, 0.1
VIEWS = 8
COST = {
    "CNN, 256 rows": "CNN",
    "transformer, 16 rows": "transformer",
    "ResNet18-GN, 32 rows": "ResNet18-GN",
    "UNet 3D, 16 rows": LARGER,
}


# ------------------------------------------------------------------ accuracy


class Moved:
    """A random view of an image of 8 x 8: moved by a part of a pixel along each axis, and a little brighter or darker."""

    def __call__(self, image: Tensor) -> Tensor:
        x, y, brighter = (torch.rand(3) - 0.5).tolist()
        image = torch.lerp(image, image.roll(1 if x > 0 else -1, 2), 0.5 * abs(x))
        image = torch.lerp(image, image.roll(1 if y > 0 else -1, 1), 0.5 * abs(y))
        return image * (1 + 0.2 * brighter)


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.GroupNorm(8, 32), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1, stride=2),
        nn.GroupNorm(8, 64), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 10),
    )  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What one run ended with."""

    accuracy: float
    epsilon: float
    noise: float
    seconds: float


def train(seed: int, epochs: int, views: int, lr: float) -> Outcome:
    """One private run to the budget; 0 views: the images as they are."""
    torch.manual_seed(seed)
    x, y = digits(seed)  # another split every time
    data, test, wanted = TensorDataset(x[:TRAINED], y[:TRAINED]), x[TRAINED:], y[TRAINED:]
    model = network()
    start = time.perf_counter()
    training = dpfix.make_private_safe_with_epsilon(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9),
        data_loader=DataLoader(data, batch_size=BATCH, shuffle=True), target_epsilon=EPSILON, target_delta=DELTA,
        epochs=epochs, max_grad_norm=CLIP, criterion=nn.CrossEntropyLoss(), grad_sample_mode="bookkeeping",
        augmentation=dpfix.AugmentationMultiplicity(Moved(), k=views) if views else None,
    )  # fmt: skip
    private, optimizer, loader = training
    for _ in range(epochs):
        epoch(private, optimizer, loader)
    return Outcome(
        accuracy(model, test, wanted),
        training.get_epsilon(DELTA),
        optimizer.noise_multiplier,
        time.perf_counter() - start,
    )


def accuracy_table(outcomes: dict[int, list[Outcome]]) -> list[str]:
    lines = tables.head("views", "accuracy, mean", "lowest", "highest", "epsilon", "seconds")
    for views, runs in outcomes.items():
        accuracies = [r.accuracy for r in runs]
        name = str(views) if views else "none (images as they are)"
        spread = (f"{a:.3f}" for a in (statistics.mean(accuracies), min(accuracies), max(accuracies)))
        seconds = statistics.median(r.seconds for r in runs)
        lines.append(tables.row(name, *spread, f"{runs[0].epsilon:.2f}", f"{seconds:.0f}"))
    return lines


def plot(outcomes: dict[int, list[Outcome]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3), layout="constrained")
    axis = figure.subplots()
    names = [str(v) if v else "none" for v in outcomes]
    for place, runs in enumerate(outcomes.values()):
        axis.plot([place] * len(runs), [r.accuracy for r in runs], "o", color="tab:blue", alpha=0.4)
    axis.plot([statistics.mean(r.accuracy for r in runs) for runs in outcomes.values()], "k_", markersize=18)
    axis.set(xticks=range(len(names)), xticklabels=names, xlabel="views per sample", ylabel="test accuracy")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})


# ------------------------------------------------------------------ cost


def step_times(contest: str, rounds: int) -> dict[str, float]:
    """Median CPU seconds of a step of each kind, in turns."""
    steps = {
        "ordinary": speed.stepper(contest, speed.ORDINARY)[0],
        "one": speed.stepper(contest, "auto")[0],
        "views": speed.stepper(contest, "auto", VIEWS)[0],
    }
    for step in steps.values():
        step()
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            found[name].append(cpu_seconds(step))
    return {name: statistics.median(times) for name, times in found.items()}


def cost_table(rounds: int) -> list[str]:
    lines = tables.head(
        "batch",
        "ordinary step",
        "private, one row a sample",
        "private, 8 rows a sample",
        "against one row",
        "peak memory",
    )
    for name, contest in COST.items():
        times = in_a_fresh_process(step_times, contest, rounds)
        peak = partial(in_a_fresh_process, speed.peak, contest)
        memory = peak("auto", VIEWS) / peak(speed.ORDINARY, 1)
        one, views = times["one"] / times["ordinary"], times["views"] / times["ordinary"]
        ratios = (f"{value:.2f}" for value in (one, views, views / one, memory))
        lines.append(tables.row(name, f"{times['ordinary'] * 1e3:.0f} ms", *ratios))
        print(lines[-1], flush=True)
    return lines


# ------------------------------------------------------------------ the page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--views", type=int, nargs="*", default=[0, 1, 4, 16])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--lr", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--no-cost", action="store_true")
    parser.add_argument("--write", type=Path, help="page whose tables are replaced; the plot goes beside it")
    given = parser.parse_args()
    quiet()
    outcomes = {}
    for views in given.views:
        outcomes[views] = [train(seed, given.epochs, views, given.lr) for seed in range(given.seeds)]
        print(accuracy_table({views: outcomes[views]})[-1], flush=True)
    noise = next(iter(outcomes.values()))[0].noise if outcomes else 0.0
    lines = [
        f"{given.seeds} seeds each, another split of training ({TRAINED} images) and test every time; {given.epochs} epochs, "
        f"expected batch size {BATCH}, clip norm {CLIP:g}, noise multiplier {noise:.2f}, delta {DELTA:g}.",
        "",
        *accuracy_table(outcomes),
    ]
    costs = [] if given.no_cost else ["", "Cost:", "", *cost_table(given.rounds)]
    print("\n".join(lines + costs))
    if given.write:
        tables.write(given.write, lines + costs)
        plot(outcomes, given.write.parent / "images" / "augmentation_digits.png")


if __name__ == "__main__":
    main()

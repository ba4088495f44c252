"""SimSiam on scikit-learn's digits, privately and not: does it collapse?

``python -m benchmarks.simsiam_digits [--epochs 30] [--seeds 3] [--write docs/detach.md]``

1797 images of 8 x 8 pixels, 1297 to train on, 500 to test. Two views of an image (shifted by up to a pixel, brightness
changed, pixels dropped) go through the same encoder; the prediction from one view is drawn to the features of the other,
behind a ``detach``. Printed after every few epochs:

* the standard deviation of the normalised features over the test images, per dimension, times sqrt(d): 1 for features
  spread over the sphere, 0 for a collapse;
* the accuracy of a 5-nearest-neighbour classifier on the features; beside it raw pixels, an untrained encoder and chance.

The private run makes the very loop of the other one, after one call of ``dpfix.make_private_safe``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from monai.networks.nets import resnet10
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import dpfix
from benchmarks.common import tables
from benchmarks.common.digits import digits
from benchmarks.common.process import most_allocated

TEST, BATCH, DELTA, LR = 500, 128, 5e-4, 1e-4
MEAN, STD = 0.3, 0.38  # rough constants; the exact ones would be a statistic of the data


class Views(Dataset[tuple[Tensor, Tensor]]):
    """Two random views of every image."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._view(self.images[index]), self._view(self.images[index])

    def _view(self, image: Tensor) -> Tensor:
        down, right = (int(k) for k in torch.randint(0, 3, (2,)))
        moved = F.pad(image, (1, 1, 1, 1))[:, down : down + 8, right : right + 8]
        kept = (torch.rand(1, 8, 8) > 0.1).float()
        return (moved * kept * (0.7 + 0.6 * torch.rand(())) - MEAN) / STD


def block(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Linear(inputs, outputs, bias=False), nn.LayerNorm(outputs), nn.ReLU()]


class SimSiam(nn.Module):
    """Encoder and predictor; the second view is the target only, as in one half of the paper's loss.

    The paper's BatchNorm would mix the samples. Without it a slow encoder and a fast, wide predictor keep the features
    apart: the predictor has to stay close to the best one (Tian et al. 2021).
    """

    def __init__(self, features: int = 64) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, padding=1), nn.ReLU(), nn.Flatten(),
            *block(512, 128), *block(128, 128), nn.Linear(128, features, bias=False),
        )  # fmt: skip
        self.predictor = nn.Sequential(*block(features, 256), nn.Linear(256, features))

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return self.predictor(self.encoder(a)), self.encoder(b)


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    prediction, target = model(*batch)
    return -F.cosine_similarity(prediction, target.detach(), dim=1).mean()


@dataclass
class Curve:
    """What was seen while one model was trained."""

    epochs: list[int] = field(default_factory=list)
    spread: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    epsilon: float = float("nan")
    seconds: float = 0.0
    region: str = ""


def split() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and classes to train on, and those of the test."""
    x, y = digits(0)
    return x[TEST:], y[TEST:], x[:TEST], y[:TEST]


def neighbours(train: Tensor, y: Tensor, test: Tensor, wanted: Tensor) -> float:
    model = KNeighborsClassifier(5).fit(train.flatten(1).numpy(), y.numpy())
    return float(model.score(test.flatten(1).numpy(), wanted.numpy()))


@torch.no_grad()
def look(model: Any, data: tuple[Tensor, ...]) -> tuple[float, float]:
    """Spread of the normalised features, and the accuracy of their neighbours."""
    encoder = model.encoder.eval()
    train, test = (F.normalize(encoder((x - MEAN) / STD), dim=1) for x in (data[0], data[2]))
    encoder.train()
    return float(test.std(0).mean()) * test.shape[1] ** 0.5, neighbours(train, data[1], test, data[3])


def train(seed: int, epochs: int, every: int, noise: float | None) -> Curve:
    torch.manual_seed(seed)
    data = split()
    model: Any = SimSiam()
    groups = [{"params": model.encoder.parameters()}, {"params": model.predictor.parameters(), "lr": 100 * LR}]
    optimizer: Any = torch.optim.Adam(groups, lr=LR)
    loader: Any = DataLoader(Views(data[0]), batch_size=BATCH, shuffle=True)
    curve, start, training = Curve(), time.perf_counter(), None
    if noise is not None:
        training = dpfix.make_private_safe(
            module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=noise, max_grad_norm=1.0,
            training_step=loss_of,
        )  # fmt: skip
        model, optimizer, loader = training
        curve.region = next((str(f) for f in training.report.findings if f.code == "DPF026"), "")
    for epoch in range(epochs + 1):
        if epoch % every == 0:
            spread, accuracy = look(model, data)
            curve.epochs.append(epoch)
            curve.spread.append(spread)
            curve.accuracy.append(accuracy)
        for batch in loader if epoch < epochs else ():
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
    curve.seconds = time.perf_counter() - start
    curve.epsilon = training.get_epsilon(DELTA) if training else float("inf")
    return curve


def told(curves: list[Curve], name: str) -> list[str]:
    """Rows of the table: medians over the seeds."""
    rows = []
    for k, epoch in enumerate(curves[0].epochs):
        spread = statistics.median(c.spread[k] for c in curves)
        accuracy = statistics.median(c.accuracy[k] for c in curves)
        lowest = min(c.accuracy[k] for c in curves)
        rows.append(tables.row(name, epoch, f"{spread:.2f}", f"{accuracy:.3f} ({lowest:.3f})"))
    return rows


def plot(private: list[Curve], plain: list[Curve], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.subplots(1, 2)
    for curves, name, line in ((plain, "without privacy", "o--"), (private, f"epsilon {private[0].epsilon:.1f}", "s-")):
        for axis, values in zip(axes, ([c.spread for c in curves], [c.accuracy for c in curves]), strict=True):
            axis.plot(curves[0].epochs, [statistics.median(v) for v in zip(*values, strict=True)], line, label=name)
    for axis, title in zip(axes, ("std of a feature x sqrt(d)", "5-NN accuracy"), strict=True):
        axis.set(title=title, xlabel="epoch", ylim=(0, 1))
        axis.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})


class Deep(nn.Module):
    """The same pair with MONAI's ResNet-10 as encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = resnet10(spatial_dims=2, n_input_channels=1, num_classes=32)
        self.predictor = nn.Linear(32, 32)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return self.predictor(self.encoder(a)), self.encoder(b)


def peak_of_forward(regions: bool) -> float:
    """Largest number of MB that a forward pass and the loss have allocated at one time; the target is cut in the loss."""
    torch.manual_seed(0)
    model = Deep()
    loader: Any = DataLoader(TensorDataset(torch.randn(64, 1, 64, 64), torch.randn(64, 1, 64, 64)), batch_size=16)
    training = dpfix.make_private_safe(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=loader, noise_multiplier=1.0,
        max_grad_norm=1.0, training_step=loss_of, grad_sample_mode="bookkeeping", no_grad_regions=regions,
    )  # fmt: skip
    batch = next(iter(loader))
    loss_of(training[0], batch).backward()
    training[1].zero_grad()
    return most_allocated(lambda: loss_of(training[0], batch)) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--noise", type=float, default=1.0)
    parser.add_argument("--write", type=Path, help="page whose table is replaced; the plot goes beside it")
    given = parser.parse_args()
    torch.set_num_threads(1)
    plain = [train(seed, given.epochs, given.every, None) for seed in range(given.seeds)]
    private = [train(seed, given.epochs, given.every, given.noise) for seed in range(given.seeds)]
    x, y, test, wanted = split()
    seconds = [statistics.median(c.seconds for c in curves) for curves in (plain, private)]
    lines = [
        f"Medians over {given.seeds} seeds (lowest in brackets); noise multiplier {given.noise:g}, clip norm 1, batch {BATCH}, "
        f"epsilon {private[0].epsilon:.2f} at delta {DELTA:g}. "
        f"{seconds[0]:.0f} s without privacy, {seconds[1]:.0f} s with it. 5-NN on raw pixels "
        f"{neighbours(x, y, test, wanted):.3f}, by chance 0.1.",
        "",
        *tables.head("", "epoch", "std of a feature x sqrt(d)", "5-NN accuracy"),
        *told(plain, "without privacy"),
        *told(private, "private"),
        "",
        "Peak of allocated memory from the forward pass to the loss, MONAI's ResNet-10 as encoder, 16 images of 64 x 64, "
        f"book-keeping engine: {peak_of_forward(regions=True):.1f} MB; with `no_grad_regions=False` "
        f"{peak_of_forward(regions=False):.1f} MB.",
        "",
        "What the report says:",
        "",
        "```",
        private[0].region,
        "```",
    ]
    print("\n".join(lines))
    if given.write:
        tables.write(given.write, lines)
        plot(private, plain, given.write.parent / "images" / "simsiam_digits.png")


if __name__ == "__main__":
    main()

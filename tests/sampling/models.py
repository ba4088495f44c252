"""What the tests of views and rows share: models, samples with crops, and the reference.

The reference takes every row alone by ordinary autograd, averages the rows of a sample, clips and adds up.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from monai.networks.nets import UNet
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from tests.reference import Gradients, gradients_one_by_one

SAMPLES = 6


class Shifted:
    """A random view: the input plus noise of its own."""

    def __call__(self, x: Tensor) -> Tensor:
        return x + 0.3 * torch.randn_like(x)


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(inplace=True), nn.Conv2d(4, 6, 3, stride=2, bias=False),
        nn.Flatten(), nn.Linear(54, 3),
    )  # fmt: skip


class Encoder(nn.Module):
    """A transformer on tokens, with a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.embed = nn.Linear(4, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.cat([self.token.expand(len(x), -1, -1), self.embed(x)], 1)
        return self.head(self.layer(tokens)[:, 0])


def unet() -> nn.Module:
    return nn.Sequential(
        UNet(spatial_dims=2, in_channels=1, out_channels=2, channels=(4, 8), strides=(2,), num_res_units=1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3),
    )  # fmt: skip


def hooked() -> nn.Module:
    """A model that Opacus's hooks get right."""
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))


MODELS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "hooked": (hooked, (2, 8, 8)),
    "convolution": (convolutional, (2, 8, 8)),
    "transformer": (Encoder, (5, 4)),
    "unet": (unet, (1, 8, 8)),
}


def made(name: str) -> tuple[nn.Module, TensorDataset]:
    torch.manual_seed(0)
    build, shape = MODELS[name]
    data = TensorDataset(torch.randn(SAMPLES, *shape, dtype=torch.float64), torch.randint(0, 3, (SAMPLES,)))
    return build().double(), data


def step(model: nn.Module, batch: Any, reduction: str = "mean") -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x), y, reduction=reduction)


def averaged(model: nn.Module, rows: list[Any], counts: list[int], loss: Any = step) -> list[Gradients]:
    """Per-sample gradients: every row alone, then the mean over the rows of a sample."""
    by_row = iter(gradients_one_by_one(model, loss, rows))
    by_sample = [list(islice(by_row, n)) for n in counts]
    return [{name: torch.stack([g[name] for g in mine]).mean(0) for name in mine[0]} for mine in by_sample]


def pairs(batch: Any) -> list[Any]:
    x, y = batch
    return [(x[i : i + 1], y[i : i + 1]) for i in range(len(x))]


def one_draw(data: Dataset[Any], **changes: Any) -> dict[str, Any]:
    """Arguments under which every draw holds all samples."""
    return {
        "data_loader": DataLoader(data, batch_size=SAMPLES),
        "noise_multiplier": 0.0,
        "max_grad_norm": 1.0,
        "training_step": step,
        "cache": False,
        **changes,
    }


OWN = ("bookkeeping", "vmap", "microbatch")


def released(model: nn.Module, optimizer: Any, reduction: str) -> Gradients:
    """The clipped sum, from the gradient that a step without noise would take."""
    scale = optimizer.expected_batch_size if reduction == "mean" else 1
    return {n: p.grad.detach() * scale for n, p in model.named_parameters()}


class Crops(Dataset[Any]):
    """Patients with different numbers of crops, as MONAI's transforms return them."""

    def __init__(self, shape: tuple[int, ...], counts: list[int]) -> None:
        draw = torch.Generator().manual_seed(1)
        self.items = [
            [
                {"image": torch.randn(*shape, generator=draw, dtype=torch.float64), "label": torch.tensor(i % 3)}
                for _ in range(n)
            ]
            for i, n in enumerate(counts)
        ]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


COUNTS = [1, 3, 2, 4, 1, 2]


def on_crops(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["image"]), batch["label"])


def deliver_again(loader: Any, samples: int, batch: Any) -> None:
    """The private loader hands a batch out once more, as a draw of so many samples."""
    begun = loader.ledger.expect()
    loader.ledger.start()
    begun.drew(samples)
    begun.deliver(batch)

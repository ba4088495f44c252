"""The demo: MONAI's VNet, straight from its constructor, trained with and without differential privacy.

Everything it needs ships inside the ``nilearn`` package: the MNI152 T1 volume with its grey- and white-matter
probability maps. The same training loop runs twice; the private run differs by one call.

Run it with ``make demo`` or ``python benchmarks/demo_vnet.py --help``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import matplotlib
import numpy as np
import torch
from monai.losses import DiceCELoss
from monai.networks.nets import VNet
from nilearn import datasets
from opacus import PrivacyEngine
from opacus.validators.errors import UnsupportedModuleError
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import dpfix

matplotlib.use("Agg")  # no display is needed, and none is there on a server
import matplotlib.pyplot as plt

PATCH = 16  # voxels (1 mm) per side: VNet halves its input four times, so 16 is the smallest it takes
SLAB = slice(112, 112 + PATCH)  # coronal slab kept for validation; no training patch touches it
CLASSES = ("other", "grey matter", "white matter")
DELTA = 1e-5

Sample = dict[str, Tensor]


@dataclass
class Run:
    """What one training run leaves behind: one row per epoch, and its last prediction of the slab."""

    name: str
    rows: list[dict[str, float]] = field(default_factory=list)
    prediction: Tensor | None = None
    seconds: float = 0.0


def load_volume() -> tuple[Tensor, Tensor]:
    """Loads the MNI152 T1 volume and its tissue map, cropped to the brain.

    Returns:
        image: ``[x, y, z]`` float32, shifted and scaled by fixed numbers so that tissue lies around zero.
        label: ``[x, y, z]`` int64, the likeliest of :data:`CLASSES`.
    """
    loaders = (datasets.load_mni152_template, datasets.load_mni152_gm_template, datasets.load_mni152_wm_template)
    # resolution=1 is how the maps are stored: nothing is downloaded and nothing resampled
    t1, grey, white = (np.asarray(load(resolution=1).dataobj, dtype=np.float32) for load in loaders)
    label = np.stack([1 - grey - white, grey, white]).argmax(axis=0)
    box = (slice(20, 20 + 10 * PATCH), slice(None), slice(0, 10 * PATCH))
    return torch.from_numpy((t1[box] - 0.5) / 0.25), torch.from_numpy(label[box])


def cut(image: Tensor, label: Tensor, corner: Iterable[int]) -> Sample:
    """Cuts the patch at ``corner`` into a MONAI-style sample, ``[1, PATCH, PATCH, PATCH]`` each."""
    box = tuple(slice(c, c + PATCH) for c in corner)
    return {"image": image[box][None].clone(), "label": label[box][None].clone()}


def training_patches(image: Tensor, label: Tensor, count: int, seed: int) -> list[Sample]:
    """Draws ``count`` patches with at least a quarter of grey or white matter, none touching the slab."""
    draw = torch.Generator().manual_seed(seed)
    samples: list[Sample] = []
    while len(samples) < count:
        x, y, z = (int(torch.randint(n - PATCH + 1, (), generator=draw)) for n in image.shape)
        if y + PATCH > SLAB.start and y < SLAB.stop:
            continue
        sample = cut(image, label, (x, y, z))
        if (sample["label"] > 0).float().mean() >= 0.25:
            samples.append(sample)
    return samples


def validation_tiles(image: Tensor, label: Tensor) -> Sample:
    """Cuts the slab into tiles that do not overlap, ``[tiles, 1, PATCH, PATCH, PATCH]``."""
    corners = [
        (x, SLAB.start, z) for x in range(0, image.shape[0], PATCH) for z in range(0, image.shape[2], PATCH)
    ]
    tiles = [cut(image, label, corner) for corner in corners]
    return {key: torch.stack([tile[key] for tile in tiles]) for key in ("image", "label")}


def coronal_slice(tiles: Tensor, columns: int) -> Tensor:
    """Puts the middle slice of all tiles side by side again, ``[z, x]`` with the head upwards."""
    rows = tiles[:, 0, :, PATCH // 2, :].reshape(columns, -1, PATCH, PATCH)  # [x tile, z tile, x, z]
    return rows.permute(0, 2, 1, 3).reshape(columns * PATCH, -1).T.flip(0)


def validate(model: nn.Module, tiles: Sample) -> tuple[float, Tensor]:
    """Predicts the slab.

    Returns:
        The Dice score over the whole slab, averaged over grey and white matter, and the predicted classes.
    """
    model.eval()
    with torch.no_grad():
        predicted = torch.cat([model(chunk).argmax(1, keepdim=True) for chunk in tiles["image"].split(25)])
    model.train()
    dice = []
    for tissue in (1, 2):
        mine, truth = predicted == tissue, tiles["label"] == tissue
        dice.append(2.0 * (mine & truth).sum().item() / (mine.sum() + truth.sum()).item())
    return sum(dice) / len(dice), predicted


def train(
    run: Run,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: Iterable[Sample],
    criterion: nn.Module,
    tiles: Sample,
    epochs: int,
    steps: int,
    epsilon: Callable[[], float],
) -> None:
    """Trains; the loop knows nothing of privacy and is the same for both runs.

    An epoch is a fixed number of steps, as in nnU-Net: a pass over all patches would outlast a demo.
    """
    start = time.perf_counter()
    model.train()
    with tqdm(total=epochs * steps, desc=run.name, unit="step") as bar:
        for epoch in range(1, epochs + 1):
            losses = []
            for batch in islice(loader, steps):
                optimizer.zero_grad()
                loss = criterion(model(batch["image"]), batch["label"])
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
                bar.update()
            dice, run.prediction = validate(model, tiles)
            row = {"epoch": epoch, "loss": float(np.mean(losses)), "dice": dice, "epsilon": epsilon()}
            run.rows.append(row)
            bar.write("{epoch:5.0f}   loss {loss:.3f}   Dice {dice:.3f}   epsilon {epsilon:.2f}".format(**row))
    run.seconds = time.perf_counter() - start



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


def ask_opacus(model: nn.Module, loader: DataLoader[Sample]) -> str:
    """Asks plain Opacus to train the untouched model, and returns the first line of what it answers."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    try:
        PrivacyEngine().make_private(
            module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0
        )
    except UnsupportedModuleError as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0].split('. ')[0].strip('[')[:200]}"
    return "accepted"


def draw(path: Path, runs: list[Run], tiles: Sample) -> None:
    """Draws the Dice curves, and one slice of the slab: image, truth and both predictions."""
    columns = 10
    figure = plt.figure(figsize=(12, 7), layout="constrained")
    above, below = figure.subfigures(2, 1)
    curves = above.subplots()
    for run in runs:
        curves.plot([r["epoch"] for r in run.rows], [r["dice"] for r in run.rows], marker="o", label=run.name)
    curves.set(xlabel="epoch", ylabel="validation Dice (grey, white)", ylim=(0, 1))
    curves.legend(loc="lower right")
    pictures = [("T1 image", tiles["image"], "gray"), ("truth", tiles["label"], "viridis")]
    pictures += [(run.name, run.prediction, "viridis") for run in runs]
    for axes, (title, volume, colours) in zip(below.subplots(1, len(pictures)), pictures, strict=True):
        axes.imshow(coronal_slice(volume, columns), cmap=colours)
        axes.set_title(title)
        axes.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=8, help="epochs of --steps steps (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="steps per epoch (default: %(default)s)")
    parser.add_argument("--patches", type=int, default=4000, help="training samples (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="expected batch size (default: %(default)s)")
    parser.add_argument("--noise-multiplier", type=float, default=0.6, help="noise / clip norm (default: %(default)s)")
    parser.add_argument("--max-grad-norm", type=float, default=1.0, help="clip norm (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("demo_output/demo_vnet.png"), help="(default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    """Runs the demo."""
    args = parse()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    image, label = load_volume()
    patches = training_patches(image, label, args.patches, args.seed)
    tiles = validation_tiles(image, label)
    criterion = DiceCELoss(to_onehot_y=True, softmax=True)

    def fresh() -> tuple[nn.Module, torch.optim.Optimizer, DataLoader[Sample]]:
        torch.manual_seed(args.seed)
        model = VNet(spatial_dims=3, in_channels=1, out_channels=len(CLASSES))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return model, optimizer, DataLoader(patches, batch_size=args.batch_size, shuffle=True)

    model, optimizer, loader = fresh()
    print(f"Plain Opacus, same model: {ask_opacus(model, loader)}\n")
    result = dpfix.make_private_safe(
        module=model, optimizer=optimizer, data_loader=loader,
        noise_multiplier=args.noise_multiplier, max_grad_norm=args.max_grad_norm, criterion=criterion,
    )
    print(result.report)
    ...

if __name__ == "__main__":
    main()

"""The demo: MONAI's VNet, straight from its constructor, trained with and without differential privacy.

All data ships inside the ``nilearn`` package: the MNI152 T1 volume and its grey- and white-matter probability
maps. The same training loop runs twice; the private run differs by one call.

Run it with ``make demo`` or ``python examples/vnet.py --help``.
"""

from __future__ import annotations

import argparse
import time
import warnings
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
from opacus.validators import ModuleValidator
from opacus.validators.errors import UnsupportedModuleError
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import dpfix

matplotlib.use("Agg")  # a server has no display
import matplotlib.pyplot as plt

PATCH = 16  # voxels of 1 mm a side; VNet halves its input four times, so it takes nothing smaller
SLAB = slice(112, 112 + PATCH)  # y range kept for validation: no training patch reaches into it
CLASSES = ("other", "grey matter", "white matter")

UNIT = """
A demo of the mechanics: the privacy unit is one patch, one of {} overlapping ones cut from one public
template volume. With patients' scans the unit would have to be the patient.
"""

Sample = dict[str, Tensor]


@dataclass
class Run:
    """What one training run leaves behind: a row per epoch and its last prediction of the slab."""

    name: str
    rows: list[dict[str, float]] = field(default_factory=list)
    prediction: Tensor = field(default_factory=lambda: torch.empty(0))
    seconds: float = 0.0


def load_volume() -> tuple[Tensor, Tensor]:
    """Load the MNI152 T1 volume and its tissue map, cropped to the brain.

    Returns:
        image: ``[x, y, z]`` float32, shifted and scaled by fixed numbers, not by statistics of the data.
        label: ``[x, y, z]`` int64, the likeliest of :data:`CLASSES`.
    """
    names = ("load_mni152_template", "load_mni152_gm_template", "load_mni152_wm_template")
    # 1 mm is the resolution the files have: nothing is downloaded, nothing resampled.
    t1, grey, white = (np.asarray(getattr(datasets, name)(resolution=1).dataobj) for name in names)
    label = np.stack([1 - grey - white, grey, white]).argmax(axis=0)
    brain = (slice(20, 20 + 10 * PATCH), slice(None), slice(0, 10 * PATCH))
    return torch.from_numpy((t1[brain] - 0.7) / 0.15), torch.from_numpy(label[brain])


def cut(image: Tensor, label: Tensor, corner: tuple[int, int, int]) -> Sample:
    """Cut the patch at ``corner``: ``image`` and ``label``, ``[1, PATCH, PATCH, PATCH]`` each."""
    box = tuple(slice(c, c + PATCH) for c in corner)
    return {"image": image[box][None].clone(), "label": label[box][None].clone()}


def training_patches(image: Tensor, label: Tensor, count: int, seed: int) -> list[Sample]:
    """Draw ``count`` patches outside the slab, each at least a quarter of grey or white matter."""
    draw = torch.Generator().manual_seed(seed)
    patches: list[Sample] = []
    while len(patches) < count:
        x, y, z = (int(torch.randint(size - PATCH + 1, (), generator=draw)) for size in image.shape)
        if y + PATCH > SLAB.start and y < SLAB.stop:
            continue
        patch = cut(image, label, (x, y, z))
        if (patch["label"] > 0).float().mean() >= 0.25:
            patches.append(patch)
    return patches


def validation_tiles(image: Tensor, label: Tensor) -> Sample:
    """Cut the slab into tiles that do not overlap: ``[tiles, 1, PATCH, PATCH, PATCH]`` each."""
    starts = [range(0, size, PATCH) for size in (image.shape[0], image.shape[2])]
    tiles = [cut(image, label, (x, SLAB.start, z)) for x in starts[0] for z in starts[1]]
    return {key: torch.stack([tile[key] for tile in tiles]) for key in ("image", "label")}


def middle_slice(tiles: Tensor) -> Tensor:
    """Join the middle coronal slice of all tiles again: ``[z, x]``, top of the head first."""
    grid = tiles[:, 0, :, PATCH // 2].reshape(10, 10, PATCH, PATCH)  # [x tile, z tile, x, z]
    return grid.transpose(1, 2).reshape(10 * PATCH, 10 * PATCH).T.flip(0)


def validate(model: nn.Module, tiles: Sample) -> tuple[float, Tensor]:
    """Predict the slab.

    Returns:
        Dice over the whole slab, averaged over grey and white matter, and the predicted classes.
    """
    model.eval()
    with torch.no_grad():
        predicted = torch.cat([model(part).argmax(1, keepdim=True) for part in tiles["image"].split(25)])
    model.train()
    dice = []
    for tissue in (1, 2):
        found, truth = predicted == tissue, tiles["label"] == tissue
        dice.append(2 * (found & truth).sum().item() / (found.sum() + truth.sum()).item())
    return sum(dice) / len(dice), predicted


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: DataLoader[Sample],
    *,
    criterion: nn.Module,
    tiles: Sample,
    epochs: int,
    steps: int,
    name: str,
    epsilon: Callable[[], float],
) -> Run:
    """Train and record; nothing in here knows about privacy, and both runs come through here."""
    # An epoch is a fixed number of steps, as in nnU-Net: a pass over all patches would outlast a demo.
    run, start = Run(name), time.perf_counter()
    model.train()
    print(f"\n{name}\nepoch    loss    Dice   epsilon")
    with tqdm(total=epochs * steps, desc=name, unit="step") as bar:
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
            bar.write("{epoch:5d} {loss:7.3f} {dice:7.3f} {epsilon:9.2f}".format(**row))
    run.seconds = time.perf_counter() - start
    return run


def ask_opacus(model: nn.Module, loader: DataLoader[Sample]) -> str:
    """Let plain Opacus try one forward pass of training.

    Returns:
        The first sentence of its error.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    try:
        private, *_ = PrivacyEngine().make_private(
            module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0
        )
        private(next(iter(loader))["image"][:2])
    except (UnsupportedModuleError, RuntimeError) as error:
        # The validator's error carries the list of all complaints.
        first = error.args[0][0] if isinstance(error.args[0], list) else error
        return f"{type(error).__name__}: {str(first).split('. ')[0]}."
    return "trains."


def draw(path: Path, runs: list[Run], tiles: Sample) -> None:
    """Draw the Dice curves, and the middle slice of the slab: image, truth and both predictions."""
    figure = plt.figure(figsize=(12, 7), layout="constrained")
    above, below = figure.subfigures(2, 1)
    curves = above.subplots()
    for run, marker in zip(runs, "osD^vPX", strict=False):
        curves.plot([r["epoch"] for r in run.rows], [r["dice"] for r in run.rows], marker=marker, label=run.name)
    curves.set(xlabel="epoch", ylabel="validation Dice, mean of grey and white", ylim=(0, 1))
    curves.legend(loc="lower right")
    pictures = {"T1 image": tiles["image"], "truth": tiles["label"]} | {r.name: r.prediction for r in runs}
    for axes, (title, volume) in zip(below.subplots(1, len(pictures)), pictures.items(), strict=True):
        axes.imshow(middle_slice(volume), cmap="gray")
        axes.set_title(title)
        axes.axis("off")
    path = path if path.suffix else path / "demo_vnet.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    print(f"\nCurves and one slice: {path}")


def parse(arguments: Iterable[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="MONAI's VNet with and without differential privacy.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--epochs", type=int, default=6, help="epochs")
    add("--steps", type=int, default=5, help="steps per epoch")
    add("--patches", type=int, default=4000, help="training samples")
    add("--batch-size", type=int, default=16, help="expected batch size")
    add("--lr", type=float, default=0.1, help="learning rate of both runs")
    add("--noise-multiplier", type=float, default=0.5, help="noise as a multiple of the clip norm")
    add("--max-grad-norm", type=float, default=1.0, help="clip norm of a sample's gradient")
    add("--delta", type=float, default=1e-5, help="delta of the guarantee")
    add("--seed", type=int, default=0, help="seed of patches, weights and sampling")
    add("--out", type=Path, default=Path("demo_output/demo_vnet.png"), help="picture, or folder for it")
    return parser.parse_args(None if arguments is None else list(arguments))


def fresh(
    patches: list[Sample], args: argparse.Namespace
) -> tuple[nn.Module, torch.optim.Optimizer, DataLoader[Sample]]:
    """Build what a training script has: model, optimizer and loader, the same for every call."""
    torch.manual_seed(args.seed)
    model = VNet(spatial_dims=3, in_channels=1, out_channels=len(CLASSES))
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
    return model, optimizer, DataLoader(patches, batch_size=args.batch_size, shuffle=True)


def main() -> None:
    """Run the demo."""
    args = parse()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    warnings.filterwarnings("ignore", message="Secure RNG turned off")  # the statement says so
    image, label = load_volume()
    patches = training_patches(image, label, args.patches, args.seed)
    criterion = DiceCELoss(to_onehot_y=True, softmax=True)
    settings = {"criterion": criterion, "tiles": validation_tiles(image, label)}
    settings |= {"epochs": args.epochs, "steps": args.steps}

    model, optimizer, loader = fresh(patches, args)
    print("Plain Opacus, this model:\n ", ask_opacus(model, loader))
    print("Plain Opacus, after its own ModuleValidator.fix:\n ", ask_opacus(ModuleValidator.fix(model), loader))
    print(UNIT.format(args.patches))

    start = time.perf_counter()
    result = dpfix.make_private_safe(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        noise_multiplier=args.noise_multiplier,
        max_grad_norm=args.max_grad_norm,
        criterion=criterion,
    )
    print(f"{result.report}\n\nRepaired, proven and timed in {time.perf_counter() - start:.0f} s.")
    private = train(*result, name="private", epsilon=lambda: result.get_epsilon(args.delta), **settings)
    statement = result.statement(args.delta)

    ordinary = train(*fresh(patches, args), name="not private", epsilon=lambda: float("inf"), **settings)
    draw(args.out, [private, ordinary], settings["tiles"])
    for run in (private, ordinary):
        print(f"{run.name}: Dice {run.rows[-1]['dice']:.3f} after {run.seconds:.0f} s")
    print(f"\n{statement}")


if __name__ == "__main__":
    main()

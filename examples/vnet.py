"""The first demo: MONAI's VNet, straight from its constructor, trained with and without differential privacy.

All data ships inside the ``nilearn`` package: the MNI152 T1 volume and its grey- and white-matter probability
maps. The same training loop runs twice; the private run differs by one call. Learning rate and number of epochs are
chosen for each side from the same grid, on a validation part of the volume: ``--tune`` does that, and prints the grid.

Run it with ``make demo`` or ``python examples/vnet.py --help``. What is protected is a patch, and not a person: see
``examples/volumes.py`` for patients.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from monai.losses import DiceCELoss
from monai.networks.nets import VNet
from opacus import PrivacyEngine
from opacus.validators import ModuleValidator
from opacus.validators.errors import UnsupportedModuleError
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import dpfix

matplotlib.use("Agg")  # a server has no display
import matplotlib.pyplot as plt
from tuning import Setting, tune

PATCH = 16  # voxels of 1 mm a side; VNet halves its input four times, so it takes nothing smaller
SLABS = {"validation": slice(64, 64 + PATCH), "test": slice(112, 112 + PATCH)}
"""Ranges of y that no training patch reaches into: settings are chosen on the one, and the other is looked at once."""
CLASSES = ("other", "grey matter", "white matter")

RATES, EPOCHS = (0.03, 0.1, 0.3), (3, 6)
CHOSEN = {"private": Setting(0.3, 6), "not private": Setting(0.3, 6)}
"""What ``--tune`` chooses of these for each side."""

UNIT = """
What is protected: one patch of {} that overlap, cut from one public template volume. Patches of a template are
not patients, and this epsilon says nothing about a person. Settings of both sides were chosen on the validation part,
which it does not cover. The second demo, examples/volumes.py, trains per patient.
"""

Sample = dict[str, Tensor]


@dataclass
class Run:
    """What one training run leaves behind: a row per epoch, and how the test slab is predicted in the end."""

    name: str
    rows: list[dict[str, float]] = field(default_factory=list)
    dice: float = 0.0
    prediction: Tensor = field(default_factory=lambda: torch.empty(0))
    seconds: float = 0.0


def load_volume() -> tuple[Tensor, Tensor]:
    """Load the MNI152 T1 volume and its tissue map, cropped to the brain.

    Returns:
        image: ``[x, y, z]`` float32, shifted and scaled by fixed numbers, not by statistics of the data.
        label: ``[x, y, z]`` int64, the likeliest of :data:`CLASSES`.
    """
    from nilearn import datasets  # here, so that all else can be used without it

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
    """Draw ``count`` patches outside the slabs, each at least a quarter of grey or white matter."""
    draw = torch.Generator().manual_seed(seed)
    patches: list[Sample] = []
    while len(patches) < count:
        x, y, z = (int(torch.randint(size - PATCH + 1, (), generator=draw)) for size in image.shape)
        if any(y + PATCH > slab.start and y < slab.stop for slab in SLABS.values()):
            continue
        patch = cut(image, label, (x, y, z))
        if (patch["label"] > 0).float().mean() >= 0.25:
            patches.append(patch)
    return patches


def tiles_of(image: Tensor, label: Tensor, slab: slice) -> Sample:
    """Cut a slab into tiles that do not overlap: ``[tiles, 1, PATCH, PATCH, PATCH]`` each."""
    starts = [range(0, size, PATCH) for size in (image.shape[0], image.shape[2])]
    tiles = [cut(image, label, (x, slab.start, z)) for x in starts[0] for z in starts[1]]
    return {key: torch.stack([tile[key] for tile in tiles]) for key in ("image", "label")}


def middle_slice(tiles: Tensor) -> Tensor:
    """Join the middle coronal slice of all tiles again: ``[z, x]``, top of the head first."""
    grid = tiles[:, 0, :, PATCH // 2].reshape(10, 10, PATCH, PATCH)  # [x tile, z tile, x, z]
    return grid.transpose(1, 2).reshape(10 * PATCH, 10 * PATCH).T.flip(0)


def predict(model: nn.Module, tiles: Sample) -> tuple[float, Tensor]:
    """Predict a slab.

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
    every: int = 1,
) -> Run:
    """Train, and validate after every few epochs; nothing in here knows about privacy, and both sides come through here."""
    # An epoch is a fixed number of steps, as in nnU-Net: a pass over all patches would outlast a demo.
    run, start = Run(name), time.perf_counter()
    model.train()
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
            if epoch % every == 0 or epoch == epochs:
                row = {"epoch": epoch, "loss": float(np.mean(losses)), "dice": predict(model, tiles)[0]}
                run.rows.append(row)
                bar.write("epoch {epoch}: loss {loss:.3f}, validation Dice {dice:.3f}".format(**row), sys.stderr)
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
    """Draw the Dice curves, and the middle slice of the test slab: image, truth and both predictions."""
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
    add("--tune", action="store_true", help="train the whole grid for both sides, and print what is chosen")
    add("--steps", type=int, default=5, help="steps per epoch")
    add("--patches", type=int, default=4000, help="training samples")
    add("--batch-size", type=int, default=16, help="expected batch size")
    add("--noise-multiplier", type=float, default=0.5, help="noise as a multiple of the clip norm")
    add("--max-grad-norm", type=float, default=1.0, help="clip norm of a sample's gradient")
    add("--delta", type=float, default=1e-5, help="delta of the guarantee")
    add("--seed", type=int, default=0, help="seed of patches, weights and sampling")
    add("--out", type=Path, default=Path("demo_output/demo_vnet.png"), help="picture, or folder for it")
    return parser.parse_args(None if arguments is None else list(arguments))


class Demo:
    """Data and settings, from which both sides are trained.

    Args:
        args: the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        image, label = load_volume()
        self.patches = training_patches(image, label, args.patches, args.seed)
        self.tiles = {part: tiles_of(image, label, slab) for part, slab in SLABS.items()}
        self.criterion = DiceCELoss(to_onehot_y=True, softmax=True)

    def fresh(self, lr: float) -> tuple[nn.Module, torch.optim.Optimizer, DataLoader[Sample]]:
        """Build what a training script has: model, optimizer and loader, the same for every call."""
        torch.manual_seed(self.args.seed)
        model = VNet(spatial_dims=3, in_channels=1, out_channels=len(CLASSES))
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
        return model, optimizer, DataLoader(self.patches, batch_size=self.args.batch_size, shuffle=True)

    def private(self, lr: float) -> dpfix.PrivateTraining:
        """The one call that makes it private."""
        model, optimizer, loader = self.fresh(lr)
        return dpfix.make_private_safe(
            module=model,
            optimizer=optimizer,
            data_loader=loader,
            noise_multiplier=self.args.noise_multiplier,
            max_grad_norm=self.args.max_grad_norm,
            criterion=self.criterion,
        )

    def train(self, objects: Iterable[Any], name: str, epochs: int, every: int = 1) -> Run:
        """Train model, optimizer and loader."""
        tiles, steps = self.tiles["validation"], self.args.steps
        return train(
            *objects, criterion=self.criterion, tiles=tiles, epochs=epochs, steps=steps, name=name, every=every
        )

    def dice_by_epochs(self, side: str, lr: float) -> Mapping[int, float]:
        """One line of the grid."""
        objects = self.private(lr) if side == "private" else self.fresh(lr)
        run = self.train(objects, side, EPOCHS[-1], EPOCHS[0])
        return {int(row["epoch"]): row["dice"] for row in run.rows}

    def run(self) -> None:
        """Train both sides with what was chosen for them."""
        args, start = self.args, time.perf_counter()
        model, _, loader = self.fresh(0.1)
        print("Plain Opacus, this model:\n ", ask_opacus(model, loader))
        print("Plain Opacus, after its own ModuleValidator.fix:\n ", ask_opacus(ModuleValidator.fix(model), loader))
        print(UNIT.format(args.patches))
        runs = []
        private = self.private(CHOSEN["private"].lr)
        print(f"{private.report}\n\nRepaired, proven and timed in {time.perf_counter() - start:.0f} s.\n")
        for side, setting in CHOSEN.items():
            objects = private if side == "private" else self.fresh(setting.lr)
            run = self.train(objects, side, setting.epochs, every=2)
            run.dice, run.prediction = predict(next(iter(objects)), self.tiles["test"])
            epsilon = private.get_epsilon(args.delta) if objects is private else float("inf")
            print(
                f"{side}: learning rate {setting.lr:g}, {setting.epochs} epochs, epsilon {epsilon:.2f}, "
                f"validation Dice {run.rows[-1]['dice']:.3f}, test Dice {run.dice:.3f}, {run.seconds:.0f} s"
            )
            runs.append(run)
        draw(args.out, runs, self.tiles["test"])
        print(f"\n{private.statement(args.delta)}")


def main() -> None:
    """Run the demo."""
    start = time.perf_counter()
    args = parse()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    warnings.filterwarnings("ignore", message="Secure RNG turned off")  # the statement says so
    demo = Demo(args)
    if args.tune:
        tune(demo.dice_by_epochs, RATES)
    else:
        demo.run()
    print(f"\nAll in all {time.perf_counter() - start:.0f} s on {torch.get_num_threads()} threads.")


if __name__ == "__main__":
    main()

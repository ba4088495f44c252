"""The second demo: training per patient, with and without differential privacy, on volumes that are generated.

Nobody's data. MONAI's ``create_test_image_3d`` draws overlapping balls into noise. A patient is a contrast and a noise
level of her own, and one to three such volumes, of each of which some patches are trained on: what a person gives to a
study is several items, and they are alike. The private run protects all items of a patient together
(``privacy_unit="patient"``), and its epsilon is that of a patient. Patients for validation and test are others.

Run it with ``make demo`` or ``python examples/volumes.py --help``. ``--tune`` trains the same grid of learning rates and
epochs for both sides, and prints it with what is chosen on the validation patients.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from monai.data import create_test_image_3d
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from tuning import Setting, tune

import dpfix
from dpfix.segmentation import region_dice

VOLUME, PATCH = 32, 16
PATIENTS = {"training": 400, "validation": 20, "test": 40}

RATES, EPOCHS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0), (3, 6)
CHOSEN = {"private": Setting(0.03, 6), "not private": Setting(1.0, 6)}
"""What ``--tune`` chooses of these for each side."""

UNIT = """
What is protected: one patient with all items, {} patients with {} items in all. The volumes are generated: balls in noise
(MONAI's create_test_image_3d), with a contrast and a noise level of each patient's own. They show how patients are counted and
what it costs, not how well anything is found in real scans. Settings of both sides were chosen on other patients, which
this epsilon does not cover.
"""

Item = dict[str, Any]


def volumes_of(patient: int, seed: int) -> list[Item]:
    """Generate one patient: ``image`` and ``label`` of every volume, ``[1, VOLUME, VOLUME, VOLUME]``."""
    draw = np.random.RandomState([seed, patient])
    contrast, noise = draw.uniform(0.5, 1.0), draw.uniform(0.5, 1.0)
    volumes = []
    for _ in range(draw.randint(1, 4)):
        image, label = create_test_image_3d(
            *[VOLUME] * 3, num_objs=6, rad_max=8, rad_min=3, num_seg_classes=1, random_state=draw
        )
        image = contrast * image + noise * draw.standard_normal(image.shape)
        volumes.append({"image": torch.tensor(image[None]).float(), "label": torch.tensor(label[None]).float()})
    return volumes


def patches_of(patient: int, seed: int, number: int) -> list[Item]:
    """Cut ``number`` patches of every volume of a patient; each item says whose it is."""
    draw = torch.Generator().manual_seed(1000 * seed + patient)
    items = []
    for volume in volumes_of(patient, seed):
        for _ in range(number):
            corner = torch.randint(VOLUME - PATCH + 1, (3,), generator=draw).tolist()
            box = (slice(None), *(slice(c, c + PATCH) for c in corner))
            items.append({key: whole[box].clone() for key, whole in volume.items()} | {"patient": f"patient {patient}"})
    return items


def dice_per_patient(model: nn.Module, patients: list[list[Item]]) -> float:
    """Dice of whole volumes: the mean over a patient's, then over the patients."""
    model.eval()
    found = []
    with torch.no_grad():
        for volumes in patients:
            image, label = (torch.stack([volume[key] for volume in volumes]) for key in ("image", "label"))
            found.append(region_dice(model(image).sigmoid(), label, empty=1.0).mean())
    model.train()
    return float(torch.stack(found).mean())


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: DataLoader[Item],
    *,
    criterion: nn.Module,
    validation: list[list[Item]],
    epochs: int,
    every: int = 1,
) -> dict[int, float]:
    """Train; nothing in here knows about privacy, and both sides come through here.

    Returns:
        The validation Dice after every few epochs.
    """
    dice = {}
    for epoch in tqdm(range(1, epochs + 1), unit="epoch"):
        for batch in loader:
            optimizer.zero_grad()
            criterion(model(batch["image"]), batch["label"]).backward()
            optimizer.step()
        if epoch % every == 0:
            dice[epoch] = dice_per_patient(model, validation)
    return dice


class Demo:
    """Patients and settings, from which both sides are trained.

    Args:
        args: the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        numbers = iter(range(10**6))  # nobody is in two parts
        training = [next(numbers) for _ in range(args.patients)]
        self.items = [item for p in training for item in patches_of(p, args.seed, args.patches)]
        self.others = {
            part: [volumes_of(next(numbers), args.seed) for _ in range(PATIENTS[part])]
            for part in ("validation", "test")
        }
        self.criterion = DiceCELoss(sigmoid=True)

    def fresh(self, lr: float, batch_size: int) -> tuple[nn.Module, torch.optim.Optimizer, DataLoader[Item]]:
        """Build what a training script has: model, optimizer and loader."""
        torch.manual_seed(self.args.seed)
        model = UNet(3, 1, 1, channels=(8, 16, 32), strides=(2, 2), norm=("group", {"num_groups": 4}))
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
        return model, optimizer, DataLoader(self.items, batch_size=batch_size, shuffle=True)

    def private(self, lr: float) -> dpfix.PrivateTraining:
        """The one call that makes it private, per patient."""
        model, optimizer, loader = self.fresh(lr, self.args.batch_size)  # of patients
        return dpfix.make_private_safe(
            module=model,
            optimizer=optimizer,
            data_loader=loader,
            noise_multiplier=self.args.noise_multiplier,
            max_grad_norm=self.args.max_grad_norm,
            criterion=self.criterion,
            privacy_unit="patient",
        )

    def ordinary(self, lr: float) -> tuple[nn.Module, torch.optim.Optimizer, DataLoader[Item]]:
        """The same without privacy; a batch has as many items as those of the patients in a private one."""
        return self.fresh(lr, round(self.args.batch_size * len(self.items) / self.args.patients))

    def train(self, objects: Iterable[Any], epochs: int, every: int = 1) -> dict[int, float]:
        """Train model, optimizer and loader."""
        given = {"criterion": self.criterion, "validation": self.others["validation"]}
        return train(*objects, **given, epochs=epochs, every=every)

    def dice_by_epochs(self, side: str, lr: float) -> Mapping[int, float]:
        """One line of the grid."""
        return self.train(self.private(lr) if side == "private" else self.ordinary(lr), EPOCHS[-1], EPOCHS[0])

    def run(self) -> None:
        """Train both sides with what was chosen for them."""
        print(UNIT.format(self.args.patients, len(self.items)))
        private = self.private(CHOSEN["private"].lr)
        print(f"{private.report}\n")
        for side, setting in CHOSEN.items():
            begin = time.perf_counter()
            objects = private if side == "private" else self.ordinary(setting.lr)
            validation = self.train(objects, setting.epochs)[setting.epochs]
            test = dice_per_patient(next(iter(objects)), self.others["test"])
            epsilon = private.get_epsilon(self.args.delta) if objects is private else float("inf")
            print(
                f"{side}: learning rate {setting.lr:g}, {setting.epochs} epochs, epsilon of a patient {epsilon:.2f}, "
                f"validation Dice {validation:.3f}, test Dice {test:.3f}, {time.perf_counter() - begin:.0f} s"
            )
        print(f"\n{private.statement(self.args.delta)}")


def parse(arguments: Iterable[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Training per patient on generated volumes, with and without differential privacy.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--tune", action="store_true", help="train the whole grid for both sides, and print what is chosen")
    add("--patients", type=int, default=PATIENTS["training"], help="patients to train on")
    add("--patches", type=int, default=2, help="patches of every volume")
    add("--batch-size", type=int, default=40, help="expected number of patients in a batch")
    add("--noise-multiplier", type=float, default=1.0, help="noise as a multiple of the clip norm")
    add("--max-grad-norm", type=float, default=1.0, help="clip norm of a patient's gradient")
    add("--delta", type=float, default=1e-4, help="delta of the guarantee")
    add("--seed", type=int, default=0, help="seed of patients, weights and sampling")
    return parser.parse_args(None if arguments is None else list(arguments))


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

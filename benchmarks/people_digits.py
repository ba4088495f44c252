"""Persons in place of images: what ``privacy_unit=`` protects and costs, on scikit-learn's digits with 5 images per person.

``python -m benchmarks.people_digits [--seeds 3] [--write docs/people.md]``

The same network is trained with images as units, and with persons as units, for several amounts of noise. Epsilon is stated for
an image and for a person, whatever the unit of the training was, so that rows of equal accuracy can be compared. What a
training by images guarantees to a person is computed with ``dp-accounting`` directly: her images are in a batch by chance, none
to all 5 of them, and every one may move the released sum by the clip norm (mixture of Gaussians, Ganesh 2024,
https://arxiv.org/abs/2401.10294). ``--write`` replaces the table of a page.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from dp_accounting import dp_event
from dp_accounting.pld import pld_privacy_accountant
from scipy.stats import binom
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dpfix
from benchmarks.augmentation_digits import network
from benchmarks.common import tables
from benchmarks.common.digits import accuracy, digits, epoch
from benchmarks.common.process import quiet

TRAINED, EACH, BATCH, DELTA, CLIP, LR = 1300, 5, 260, 1e-4, 0.1, 1.0
OWNERS = [image % (TRAINED // EACH) for image in range(TRAINED)]
"""To whom every image belongs; the images come in a random order."""
NOISE = {"images": (1.0, 2.0, 4.0), "persons": (0.75, 1.0, 1.5, 2.0)}
"""Noise multipliers of the trainings, by unit."""


@dataclass(frozen=True)
class Outcome:
    """What one run ended with.

    Attributes:
        accuracy: on images that were not trained on.
        epsilon: of the unit of the training.
        steps: releases.
    """

    accuracy: float
    epsilon: float
    steps: int


def train(seed: int, epochs: int, unit: str, noise: float) -> Outcome:
    """One private run; with persons a batch has as many images in the mean as with images."""
    torch.manual_seed(seed)
    x, y = digits(seed)  # another split every time
    model = network()
    given: dict[str, Any] = {"privacy_unit": OWNERS} if unit == "persons" else {}
    training = dpfix.make_private_safe(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9),
        data_loader=DataLoader(TensorDataset(x[:TRAINED], y[:TRAINED]), BATCH // EACH if given else BATCH, shuffle=True),
        noise_multiplier=noise, max_grad_norm=CLIP, criterion=nn.CrossEntropyLoss(), accountant="pld",
        grad_sample_mode="bookkeeping", **given,
    )  # fmt: skip
    private, optimizer, loader = training
    for _ in range(epochs):
        epoch(private, optimizer, loader)
    statement = training.statement(DELTA)
    return Outcome(accuracy(model, x[TRAINED:], y[TRAINED:]), statement.epsilon, statement.steps)


def of_a_person(noise: float, steps: int) -> float:
    """Epsilon of a person with all her images in a training that samples and clips images."""
    rate = BATCH / TRAINED
    one = dp_event.MixtureOfGaussiansDpEvent(
        noise, list(range(EACH + 1)), [float(binom.pmf(k, EACH, rate)) for k in range(EACH + 1)]
    )
    accountant = pld_privacy_accountant.PLDAccountant()
    accountant.compose(dp_event.SelfComposedDpEvent(one, steps))
    return float(accountant.get_epsilon(DELTA))


def table(epochs: int, seeds: int) -> list[str]:
    lines = tables.head(
        "clipped and drawn", "noise multiplier", "accuracy, mean", "lowest", "highest", "epsilon of an image",
        "epsilon of a person",
    )  # fmt: skip
    for unit, noises in NOISE.items():
        for noise in noises:
            runs = [train(seed, epochs, unit, noise) for seed in range(seeds)]
            found = [r.accuracy for r in runs]
            spread = (f"{a:.3f}" for a in (statistics.mean(found), min(found), max(found)))
            own = runs[0].epsilon
            person = own if unit == "persons" else of_a_person(noise, runs[0].steps)
            image = f"at most {own:.2f}" if unit == "persons" else f"{own:.2f}"
            lines.append(tables.row(unit, f"{noise:g}", *spread, image, f"{person:.2f}"))
            print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--write", type=Path, help="page whose table is replaced")
    given = parser.parse_args()
    quiet()
    lines = [
        f"{given.seeds} seeds each, another split of training ({TRAINED} images of {TRAINED // EACH} persons) and test every "
        f"time; {given.epochs} epochs, {BATCH} images in an expected batch, those of {BATCH // EACH} persons where persons are "
        f"drawn; clip norm {CLIP:g}, delta {DELTA:g}.",
        "",
        *table(given.epochs, given.seeds),
    ]
    print("\n".join(lines))
    if given.write:
        tables.write(given.write, lines)


if __name__ == "__main__":
    main()

"""nnU-Net from raw images to an ensemble, with and without differential privacy, on a small synthetic data set.

``python -m benchmarks.nnunet_private [--write docs/nnunet.md]`` needs nnunetv2 (``pip install dpfix[nnunet]``) and takes
some minutes on one core. Eight training cases in two folds, two test cases, nested regions; the table has Dice on the test
cases of the ensemble of both folds, epsilon of one fold, seconds for training both folds, and the Dice that a second
sigmoid leaves of the same predictions, as nnunetv2 up to 2.6.4 applies it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import tables
from benchmarks.common.process import quiet
from dpfix.segmentation import Regions, ensemble_probabilities, region_dice, segmentation_from_probabilities
from tests.integrations import nnunet_workflow as workflow
from tests.segmentation.exports import ORDER, REGIONS, truth

NOISE = (None, 0.0, 0.3, 1.0)
TUMOUR = Regions.from_dataset_json({"labels": REGIONS, "regions_class_order": ORDER})


def train_folds(plans: str, name: str, epochs: int, steps: int) -> tuple[list[Any], float]:
    """Both folds; the seconds hold the audit, the steps, the online validation and the plots."""
    trainers, begin = [], time.perf_counter()
    for fold in range(2):
        torch.manual_seed(fold)
        np.random.seed(fold)
        trainers.append(workflow.train(workflow.trainer(fold, plans, name), epochs, steps))
    return trainers, time.perf_counter() - begin


def dice(segmentations: Sequence[np.ndarray]) -> str:
    """Mean over the test cases, per region."""
    values = []
    for case, segmentation in zip(range(workflow.CASES - 2, workflow.CASES), segmentations, strict=True):
        labels = truth(case, (20, 20 + 2 * (case % 2), 20)).transpose(2, 1, 0)  # nnU-Net's order of axes
        parts = [torch.from_numpy(np.ascontiguousarray(s).astype(np.int64))[None] for s in (segmentation, labels)]
        values.append(region_dice(*(TUMOUR.from_labels(p)[None] for p in parts), empty=0.0)[0])
    return " ".join(f"{value:.2f}" for value in torch.stack(values).mean(0).tolist())


def activated_again(mean: np.ndarray) -> np.ndarray:
    """What a second sigmoid makes of averaged probabilities."""
    out = np.zeros(mean.shape[1:], np.uint16)
    for region, label in enumerate(ORDER):
        out[1 / (1 + np.exp(-mean[region])) > 0.5] = label
    return out


def row(folder: Path, plans: str, noise: float | None, epochs: int, steps: int) -> str:
    """One row of the table."""
    variables = {"nnUNet_n_proc_DA": "0", "DPFIX_NNUNET_PATIENTS": "2", "DPFIX_NNUNET_ACCOUNTANT": "rdp"}
    if noise is not None:
        variables["DPFIX_NNUNET_NOISE_MULTIPLIER"] = str(noise)
    name = "nnUNetTrainer" if noise is None else "nnUNetTrainerDP"
    with workflow.installed(folder, **variables):
        trainers, seconds = train_folds(plans, name, epochs, steps)
        model, raw = Path(trainers[0].output_folder).parent, folder / "raw" / workflow.NAME
        members = [workflow.predict(model, fold, folder / f"{name}_{noise}_{fold}", raw) for fold in range(2)]
    means = list(ensemble_probabilities(members).values())
    ours = dice([segmentation_from_probabilities(m, regions_class_order=ORDER) for m in means])
    again = dice([activated_again(m) for m in means])
    epsilon = "-" if noise is None else f"{trainers[0].statement().epsilon:.3g}"
    what = "nnUNetTrainer" if noise is None else f"nnUNetTrainerDP, noise multiplier {noise:g}"
    return tables.row(what, epsilon, ours, again, f"{seconds:.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=50, help="steps per epoch")
    parser.add_argument("--write", type=Path, help="page with the table")
    options = parser.parse_args()
    quiet()
    lines = tables.head("trainer", "epsilon", "Dice (whole, core, enhancing)", "Dice after a second sigmoid", "seconds")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        workflow.make_raw(folder)
        with workflow.installed(folder):
            plans = workflow.prepare(folder)
        for noise in NOISE:
            lines.append(row(folder, plans, noise, options.epochs, options.steps))
            print(lines[-1], flush=True)
    print("\n".join(lines))
    if options.write:
        tables.write(options.write, lines)


if __name__ == "__main__":
    main()

"""``dpfix nnunet doctor``: what in this installation, these plans and these settings cannot work or cannot be private."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from dpfix.errors import ArgumentError, BudgetError, SegmentationError, UnknownArgumentError
from dpfix.integrations.nnunet.settings import PREFIX, read_settings
from dpfix.segmentation.regions import Regions

TRAINERS = Path(__file__).parent / "trainers"
"""What ``nnUNet_extTrainer`` has to name."""

OLDEST, ENSEMBLES_REGIONS = (2, 6), (2, 7)


@dataclass(frozen=True)
class Remark:
    """One thing the doctor says.

    Attributes:
        wrong: whether it has to be changed; the rest is worth knowing.
        text: fact, reason and way out.
    """

    wrong: bool
    text: str

    def __str__(self) -> str:
        return f"{'wrong' if self.wrong else 'note '}  {self.text}"


def diagnose_installation(
    environment: Mapping[str, str] = os.environ, dataset: Path | None = None, plans: str = "nnUNetPlans"
) -> list[Remark]:
    """Look at the installed nnU-Net, the environment, and the plans of a data set.

    Args:
        environment: environment variables.
        dataset: folder of the preprocessed data set, if its plans are to be looked at.
        plans: name of the plans.

    Returns:
        Remarks; empty if there is nothing to say.
    """
    remarks = [*_version(), *_discovery(environment), *_processes(environment)]
    try:
        settings = read_settings(environment)
        if dataset is None and not any(key.startswith(PREFIX) for key in environment):
            remarks.append(Remark(False, f"no {PREFIX}... variable is set; a budget has to be, here or in the plans."))
        elif dataset is None:
            settings.check_budget()
    except (ArgumentError, BudgetError, UnknownArgumentError) as error:
        remarks.append(Remark(True, str(error)))
    return remarks + (list(_plans(environment, dataset, plans)) if dataset is not None else [])


def _version() -> Iterator[Remark]:
    try:
        text = metadata.version("nnunetv2")
    except metadata.PackageNotFoundError:
        yield Remark(True, "nnunetv2 is not installed. pip install 'dpfix[nnunet]'.")
        return
    version = tuple(int(n) for n in re.findall(r"\d+", text)[:2])
    if version < ENSEMBLES_REGIONS:
        yield Remark(
            True,
            f"nnunetv2 {text}: nnUNetv2_ensemble applies the sigmoid to the averaged probabilities of regions once more; every "
            "region is then above one half. Update to 2.7.0 or newer, or ensemble with dpfix segment ensemble.",
        )
    if version < OLDEST:
        yield Remark(True, f"nnunetv2 {text}: the private trainer needs 2.6 or newer.")


def _discovery(environment: Mapping[str, str]) -> Iterator[Remark]:
    named = [Path(p).resolve() for p in environment.get("nnUNet_extTrainer", "").split(os.pathsep) if p.strip()]
    if TRAINERS.resolve() not in named:
        yield Remark(
            False,
            f"nnUNet_extTrainer does not name {TRAINERS}, so -tr nnUNetTrainerDP is not found. export nnUNet_extTrainer="
            "$(dpfix nnunet trainers); nnunetv2 2.6 does not read it: copy nnUNetTrainerDP.py into its folder "
            "training/nnUNetTrainer.",
        )
    if importlib.util.find_spec("nnunetv2") and importlib.util.find_spec("timm"):
        try:
            import torchvision  # pyright: ignore[reportMissingImports] # noqa: F401
        except (ImportError, RuntimeError) as error:
            yield Remark(
                True,
                f"torchvision cannot be imported ({error}); nnU-Net imports every trainer it comes with when it looks for "
                "one, and one of them needs it by way of timm. Install the torchvision that belongs to this torch.",
            )


def _processes(environment: Mapping[str, str]) -> Iterator[Remark]:
    if environment.get("nnUNet_n_proc_DA") == "0":
        yield Remark(
            False, "nnUNet_n_proc_DA=0: training works, but nnUNetv2_plan_and_preprocess fails; use 1 for that."
        )
    if environment.get("nnUNet_compile", "").lower() in ("1", "true", "t"):
        yield Remark(False, "nnUNet_compile is set: the private trainer does not compile the network.")


def _plans(environment: Mapping[str, str], dataset: Path, name: str) -> Iterator[Remark]:
    file = dataset / f"{name}.json"
    if not file.is_file():
        yield Remark(True, f"{file} does not exist. Run nnUNetv2_plan_and_preprocess first.")
        return
    plans = json.loads(file.read_text())
    try:
        read_settings(environment, plans).check_budget()
    except (ArgumentError, BudgetError, UnknownArgumentError) as error:
        yield Remark(True, str(error))
    described = json.loads((dataset / "dataset.json").read_text()) if (dataset / "dataset.json").is_file() else {}
    labels = described.get("labels", {})
    if any(isinstance(value, list) and len(value) > 1 for value in labels.values()):
        try:
            Regions.from_dataset_json(described)
        except SegmentationError as error:
            yield Remark(not described.get("regions_class_order"), str(error))
    if "ignore" in labels:
        yield Remark(
            False, "the data set has an ignore label: the loss is averaged over the labelled voxels of each patient."
        )
    for title, configuration in plans.get("configurations", {}).items():
        yield from _configuration(title, configuration)


def _configuration(title: str, configuration: Mapping[str, Any]) -> Iterator[Remark]:
    if configuration.get("previous_stage"):
        yield Remark(
            True, f"{title} is the second stage of a cascade, which the private trainer refuses; train one stage only."
        )
    if configuration.get("batch_dice"):
        yield Remark(
            False, f"{title} has batch_dice: it is taken over the patches of one patient, since it couples the samples."
        )

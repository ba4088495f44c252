"""nnU-Net from raw images to an ensemble, on a small synthetic data set of nested regions; needs nnunetv2."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from dpfix.integrations.nnunet.doctor import TRAINERS
from tests.segmentation.exports import ORDER, REGIONS, truth

NUMBER, NAME = 77, "Dataset077_Nested"
CASES = 10


@contextmanager
def installed(folder: Path, **variables: str) -> Iterator[None]:
    """Folders and variables of nnU-Net set, and what cannot be imported beside a CPU build of torch replaced.

    nnU-Net imports every trainer it comes with when it looks for one; one of them imports timm, which imports torchvision.
    """
    paths = {f"nnUNet_{part}": str(folder / part) for part in ("raw", "preprocessed", "results")}
    wanted = paths | {"nnUNet_extTrainer": str(TRAINERS), "nnUNet_compile": "0", "nnUNet_n_proc_DA": "1"} | variables
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    if find_spec("torchvision") is None:
        for name in ("timm", "timm.layers", "timm.models", "timm.models.eva"):
            sys.modules.setdefault(name, _Anything(name))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


class _Anything(ModuleType):
    """A module that has every class."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (torch.nn.Module,), {})


def make_raw(folder: Path, labels: Mapping[str, Any] = REGIONS, size: int = 20) -> None:
    """Ten cases: nested ellipsoids, brighter inside, under noise."""
    import nibabel

    target = folder / "raw" / NAME
    for part in ("imagesTr", "labelsTr", "imagesTs"):
        (target / part).mkdir(parents=True)
    for case in range(CASES):
        shape = (size, size + 2 * (case % 2), size)
        segmentation = truth(case, shape).astype(np.uint8)
        image = segmentation + np.random.default_rng(case).normal(0, 0.4, shape)
        affine = np.diag([1.0, 1.0, 1.2, 1.0])
        where = "imagesTr" if case < CASES - 2 else "imagesTs"
        nibabel.save(nibabel.Nifti1Image(image.astype(np.float32), affine), target / where / f"c{case}_0000.nii.gz")
        if where == "imagesTr":
            nibabel.save(nibabel.Nifti1Image(segmentation, affine), target / "labelsTr" / f"c{case}.nii.gz")
    dataset = {
        "channel_names": {"0": "MR"},
        "labels": dict(labels),
        "numTraining": CASES - 2,
        "file_ending": ".nii.gz",
        "overwrite_image_reader_writer": "NibabelIO",
    }
    if labels is REGIONS:
        dataset["regions_class_order"] = ORDER
    (target / "dataset.json").write_text(json.dumps(dataset))


def prepare(folder: Path, configuration: str = "3d_fullres", planner: str = "ExperimentPlanner") -> str:
    """Fingerprint, plans, preprocessing, and a split into two folds.

    Returns:
        Name of the plans.
    """
    api = import_module("nnunetv2.experiment_planning.plan_and_preprocess_api")
    api.extract_fingerprints([NUMBER], num_processes=1, verbose=False)
    plans = api.plan_experiments([NUMBER], planner)
    file = folder / "preprocessed" / NAME / f"{plans}.json"
    content = json.loads(file.read_text())
    for one in content["configurations"].values():  # networks for tests: fewer features than planned
        if "architecture" in one:
            kwargs = one["architecture"]["arch_kwargs"]
            kwargs["features_per_stage"] = [min(f, 8) for f in kwargs["features_per_stage"]]
    file.write_text(json.dumps(content))
    api.preprocess([NUMBER], plans, (configuration,), (1,))
    cases = [f"c{case}" for case in range(CASES - 2)]
    split = [{"train": cases[::2], "val": cases[1::2]}, {"train": cases[1::2], "val": cases[::2]}]
    (folder / "preprocessed" / NAME / "splits_final.json").write_text(json.dumps(split))
    return plans


def trainer(
    fold: int, plans: str, name: str = "nnUNetTrainerDP", configuration: str = "3d_fullres", resume: bool = False
) -> Any:
    """A trainer as ``nnUNetv2_train`` makes it."""
    run = import_module("nnunetv2.run.run_training")
    return run.get_trainer_from_args(
        NAME, configuration, fold, name, plans, continue_training=resume, device=torch.device("cpu")
    )


def train(made: Any, epochs: int, steps: int, resume: bool = False) -> Any:
    """Train and validate as ``nnUNetv2_train`` does, ``--c`` with ``resume``."""
    run = import_module("nnunetv2.run.run_training")
    made.num_epochs, made.num_iterations_per_epoch, made.num_val_iterations_per_epoch = epochs, steps, 2
    run.maybe_load_checkpoint(made, resume, False)
    made.run_training()
    return made


def predict(model: Path, fold: int, output: Path, raw: Path, part: str = "imagesTs") -> Path:
    """Predict with the stock predictor, probabilities too."""
    output.mkdir(parents=True, exist_ok=True)
    module = import_module("nnunetv2.inference.predict_from_raw_data")
    predictor = module.nnUNetPredictor(
        use_mirroring=False, perform_everything_on_device=False, device=torch.device("cpu"), allow_tqdm=False
    )
    predictor.initialize_from_trained_model_folder(str(model), (fold,), "checkpoint_final.pth")
    predictor.predict_from_files_sequential(str(raw / part), str(output), save_probabilities=True)
    return output

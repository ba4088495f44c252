"""Ensembling whole folders of predictions, one case at a time."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpfix.errors import ArgumentError, SegmentationError
from dpfix.segmentation.ensemble import EnsembledCases, ensemble_probabilities, segmentation_from_probabilities
from dpfix.segmentation.images import write_segmentation
from dpfix.segmentation.members import SAME_CLASSES
from dpfix.segmentation.regions import Regions


def ensemble_folders(
    folders: Sequence[str | Path],
    output: str | Path,
    *,
    kind: str | None = None,
    regions_class_order: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
    save_probabilities: bool = False,
    progress: bool = True,
) -> list[Path]:
    """Average the predictions of several models and write one label map per case.

    Only one case is in memory at a time.

    Args:
        folders: one per model, with an ``.npz`` (and ``.pkl``) per case, as ``nnUNetv2_predict --save_probabilities``
            writes them.
        output: folder for the label maps; made if it does not exist.
        kind: ``"regions"`` or ``"labels"``; told from the first folder's ``dataset.json`` if not given.
        regions_class_order: as in ``dataset.json``, which is read if it is not given.
        weights: one per folder; equal if not given.
        save_probabilities: write the averaged probabilities, too, and copy the ``.pkl``.
        progress: show a progress bar on a terminal.

    Returns:
        The label maps that were written.

    Raises:
        ArgumentError: a folder does not exist, or the kind is not known, or that of regions without their order.
    """
    paths = [Path(folder) for folder in folders]
    for path in paths:
        if not path.is_dir():
            raise ArgumentError(
                f"folder {path} does not exist.", help="Pass one folder of predictions per model.", path="folders"
            )
    dataset = _common_dataset(paths)
    if kind is None:
        kind = _kind(dataset, regions_class_order)
    if kind == "regions" and regions_class_order is None:
        regions_class_order = dataset.get("regions_class_order")
    if kind == "regions" and regions_class_order is None:
        raise ArgumentError(
            "regions_class_order is not known.",
            _why_no_order(paths[0], dataset),
            "Or pass the label of every region, in the order of the classes: regions_class_order=, --regions-class-order.",
            path="regions_class_order",
        )
    cases: EnsembledCases = ensemble_probabilities(paths, kind=kind, weights=weights)
    target = Path(output)
    target.mkdir(parents=True, exist_ok=True)
    if dataset:
        shutil.copyfile(paths[0] / "dataset.json", target / "dataset.json")
    ending = dataset.get("file_ending", ".nii.gz")
    order = regions_class_order if kind == "regions" else None
    return [_write(cases, case, target, ending, order, save_probabilities) for case in _shown(cases, progress)]


def _why_no_order(folder: Path, dataset: Mapping[str, Any]) -> str:
    if not dataset:
        return f"{folder} has no dataset.json."
    try:
        Regions.from_dataset_json(dataset)
    except SegmentationError as error:
        return f"{folder}: {error}"
    return ""


def _write(
    cases: EnsembledCases, case: str, target: Path, ending: str, order: Sequence[int] | None, probabilities: bool
) -> Path:
    mean, first = cases.case(case)
    segmentation = segmentation_from_probabilities(mean, regions_class_order=order)
    if probabilities:
        np.savez_compressed(target / f"{case}.npz", probabilities=mean)
        properties = cases.folders[0] / f"{case}.pkl"
        if properties.is_file():
            shutil.copyfile(properties, target / properties.name)
    name = f"{case}_segmentation" if probabilities and not first.properties else case
    return write_segmentation(segmentation, target / f"{name}{ending}", first.properties)


def _shown(cases: EnsembledCases, progress: bool) -> Any:
    if not (progress and sys.stderr.isatty()):
        return cases
    try:
        from tqdm import tqdm
    except ImportError:
        return cases
    return tqdm(cases, desc="ensembling", unit="case")


def _common_dataset(folders: Sequence[Path]) -> Mapping[str, Any]:
    """The ``dataset.json`` of the first folder; the others have to name the same labels."""
    found = {f: json.loads((f / "dataset.json").read_text()) for f in folders if (f / "dataset.json").is_file()}
    if folders[0] not in found:
        return {}
    first = found[folders[0]]
    for folder, other in found.items():
        for key in ("labels", "regions_class_order"):
            # the order of the labels is the order of the classes, which == does not compare
            if json.dumps(first.get(key)) != json.dumps(other.get(key)):
                raise SegmentationError(
                    f"folder {folder} has {key} {other.get(key)}, folder {folders[0]} has {first.get(key)} (dataset.json).",
                    help=SAME_CLASSES,
                    path=str(folder),
                )
    return first


def _kind(dataset: Mapping[str, Any], regions_class_order: Sequence[int] | None) -> str:
    if not dataset and regions_class_order is None:
        raise ArgumentError(
            "kind is not known: there is no dataset.json in the first folder.",
            help="Pass kind='regions' or kind='labels'.",
            path="kind",
        )
    labels = dataset.get("labels", {}).values()
    regions = regions_class_order is not None or any(isinstance(v, (list, tuple)) and len(v) > 1 for v in labels)
    return "regions" if regions else "labels"

"""Predictions as nnU-Net exports them: nested regions, cropped and padded, one folder per model."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np

REGIONS = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": [3]}
ORDER = [1, 2, 3]
LABELS = {"background": 0, "edema": 1, "core": 2, "enhancing": 3}
SHAPE = (6, 9, 8)
DATASET: dict[str, Any] = {"channel_names": {"0": "MR"}, "file_ending": ".nii.gz", "numTraining": 2}


def truth(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """A label map of nested ellipsoids."""
    draw = np.random.default_rng(seed)
    centre = [s / 2 + draw.uniform(-0.5, 0.5) for s in shape]
    grid = np.meshgrid(*(np.arange(s) for s in shape), indexing="ij")
    distance = sum(((g - c) / s) ** 2 for g, c, s in zip(grid, centre, shape, strict=True)) ** 0.5
    return (distance < 0.42).astype(int) + (distance < 0.3) + (distance < 0.18)


def logits(labels: np.ndarray, seed: int, kind: str) -> np.ndarray:
    """What a model might return for a label map: right on the whole, uncertain at the borders."""
    draw = np.random.default_rng(100 + seed)
    if kind == "regions":
        wanted = np.stack([labels >= label for label in ORDER])
    else:
        wanted = np.stack([labels == label for label in range(4)])
    return (8.0 * wanted - 4 + draw.normal(0, 2.5, wanted.shape)).astype(np.float32)


def activated(values: np.ndarray, kind: str) -> np.ndarray:
    """One sigmoid, or one softmax over the classes."""
    if kind == "regions":
        return 1 / (1 + np.exp(-values))
    high = np.exp(values - values.max(0))
    return high / high.sum(0)


def probabilities(labels: np.ndarray, seed: int, kind: str = "regions") -> np.ndarray:
    """Probabilities of one model for one case; a border is outside its crop."""
    out = activated(logits(labels, seed, kind), kind)
    outside = np.ones(labels.shape, bool)
    outside[1:-1, 1:-1, 1:-1] = False
    out[:, outside] = 0
    if kind == "labels":
        out[0, outside] = 1
    return out


def properties(spacing: tuple[float, ...] = (2.0, 1.0, 1.5)) -> dict[str, Any]:
    """What nnU-Net's nibabel reader knows about an image."""
    affine = np.diag([spacing[2], spacing[1], spacing[0], 1.0])
    return {
        "nibabel_stuff": {"original_affine": affine},
        "spacing": list(spacing),
        "bbox_used_for_cropping": [[1, s - 1] for s in SHAPE],
        "shape_before_cropping": SHAPE,
        "class_locations": {1: np.zeros((3, 4), np.int64)},
    }


def export(folder: Path, model: int, kind: str = "regions", cases: int = 2) -> Path:
    """One folder of predictions."""
    folder.mkdir(parents=True, exist_ok=True)
    dataset = DATASET | ({"labels": REGIONS, "regions_class_order": ORDER} if kind == "regions" else {"labels": LABELS})
    (folder / "dataset.json").write_text(json.dumps(dataset))
    for case in range(cases):
        values = probabilities(truth(case), 10 * model + case, kind)
        np.savez_compressed(folder / f"case_{case}.npz", probabilities=values)
        (folder / f"case_{case}.pkl").write_bytes(pickle.dumps(properties()))
    return folder

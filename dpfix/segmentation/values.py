"""Whether an array holds probabilities: not logits, not labels, and activated once."""

from __future__ import annotations

import math

import numpy as np

from dpfix.errors import ArgumentError, SegmentationError

KINDS = ("regions", "labels")
"""What the classes are: overlapping regions (a sigmoid each), or labels that exclude each other (one softmax)."""

SIGMOID_OF_ONE = 1 / (1 + math.exp(-1))
"""A sigmoid of a probability lies between 0.5 and this, 0.7311."""


def check_kind(kind: str) -> None:
    """Refuse a kind that is none of :data:`KINDS`.

    Raises:
        ArgumentError: it is another.
    """
    if kind not in KINDS:
        raise ArgumentError(
            f"kind={kind!r} is none of {', '.join(map(repr, KINDS))}.",
            help="Regions overlap and had a sigmoid each; labels exclude each other and had one softmax.",
            path="kind",
        )


def check_probabilities(values: np.ndarray, *, kind: str = "regions", name: str = "probabilities") -> None:
    """Refuse what is no probability, or went through its activation twice.

    Args:
        values: ``[classes, *spatial]``.
        kind: ``"regions"`` or ``"labels"``.
        name: what the values are called in a message.

    Raises:
        SegmentationError: the values are logits, labels, not finite, of the other kind, or activated twice.
    """
    check_kind(kind)
    if values.ndim < 2 or not values.size or not np.issubdtype(values.dtype, np.floating):
        raise SegmentationError(
            f"{name} has shape {values.shape} and dtype {values.dtype}; probabilities are floating point numbers of shape "
            "[classes, *spatial].",
            help="Export them from the model (nnU-Net: --save_probabilities), not a label map.",
            path=name,
        )
    low, high = float(values.min()), float(values.max())
    rounding = 2e-3 if values.dtype == np.float16 else 1e-5
    if not math.isfinite(low + high):
        raise SegmentationError(
            f"{name} holds values that are not finite.", help="Look at the model's weights and its input.", path=name
        )
    if low < -rounding or high > 1 + rounding:
        activation = "sigmoid" if kind == "regions" else "softmax over the classes"
        raise SegmentationError(
            f"{name} holds values from {low:.4g} to {high:.4g}, outside [0, 1]: logits.",
            "An average of logits is another prediction.",
            f"Apply the {activation} once, then ensemble.",
            path=name,
        )
    _check_sums(values, kind, name)
    twice = _sigmoid_twice(values) if kind == "regions" else _softmax_twice(values)
    if twice:
        raise SegmentationError(
            f"{name} went through its activation twice: {twice}.",
            "Every voxel looks undecided then, and of regions, each is above one half and gets the last one's label.",
            "Export probabilities anew, with one activation: nnunetv2 up to 2.6.4 applies a second one when it ensembles "
            "regions.",
            path=name,
        )


def _check_sums(values: np.ndarray, kind: str, name: str) -> None:
    classes = values.shape[0]
    sums = values.sum(0, dtype=np.float32)
    low, high = float(sums.min()), float(sums.max())
    if kind == "labels" and (classes < 2 or low < 0.99 or high > 1.01):
        raise SegmentationError(
            f"{name} was taken for labels, but its {classes} classes sum up to {low:.4g} to {high:.4g} per voxel instead of "
            "1.",
            help="If the model was trained on regions, pass kind='regions', and for a label map regions_class_order=, the label "
            "of every region.",
            path=name,
        )
    if kind == "regions" and classes > 1 and low > 0.999 and high < 1.001:
        raise SegmentationError(
            f"{name} was taken for regions, but its {classes} classes sum up to 1 in every voxel, as a softmax makes them.",
            help="Pass kind='labels', and no regions_class_order.",
            path=name,
        )


def _sigmoid_twice(values: np.ndarray) -> str:
    """Why regions look activated twice, or an empty text."""
    # zeros are what a crop is padded with
    low = float(values.min(where=values > 0, initial=1.0))
    high = float(values.max())
    if high == 0 or low < 0.5 - 1e-3 or high > SIGMOID_OF_ONE + 1e-3:
        return ""
    return f"all its values lie between {low:.4f} and {high:.4f}; a sigmoid of probabilities lies in [0.5, 0.7311]"


def _softmax_twice(values: np.ndarray) -> str:
    """Why labels look activated twice, or an empty text."""
    # A softmax of probabilities p over C classes lies between 1/(e+C-1) and e/(e+C-1), and gives them back as
    # log q + (1 - sum log q) / C. A model that is merely undecided stays within the bounds too; then what comes back is
    # negative somewhere, or certain nowhere.
    classes = values.shape[0]
    inside = values.reshape(classes, -1)
    inside = inside[:, inside.max(0) < 1]  # a crop is padded with background of probability 1
    if not inside.size:
        return ""
    low, high = float(inside.min()), float(inside.max())
    least = 1 / (math.e + classes - 1)
    if low < least - 1e-3 or high > math.e * least + 1e-3:
        return ""
    logs = np.log(inside.astype(np.float64))
    before = logs + (1 - logs.sum(0)) / classes
    if before.min() < -1e-2 or before.max() < 0.9:
        return ""
    bounds = f"[{least:.4f}, {math.e * least:.4f}]"
    return f"all its values lie between {low:.4f} and {high:.4f}; a softmax of {classes} probabilities lies in {bounds}"

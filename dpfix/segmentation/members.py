"""Members of an ensemble: arrays, tensors, and what nnU-Net exports."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from typing_extensions import override

from dpfix.errors import ArgumentError, SegmentationError

_HARMLESS = {("builtins", name) for name in ("set", "frozenset", "slice", "range", "complex", "bytearray")} | {
    ("collections", "OrderedDict"),
    ("_codecs", "encode"),
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
}
"""What a file of properties may name; a pickle could name, and run, anything."""
SAME_CLASSES = "Members have to be trained on the same labels or regions, in the same order."


@dataclass(frozen=True)
class Member:
    """Probabilities of one case by one model.

    Attributes:
        name: what it is called in a message.
        values: ``[classes, *spatial]``.
        geometry: where the voxels are (spacing, origin, direction), as far as it is known.
        properties: nnU-Net's properties of the case; empty if there are none.
    """

    name: str
    values: np.ndarray
    geometry: Mapping[str, np.ndarray] = field(default_factory=dict)
    properties: Mapping[str, Any] = field(default_factory=dict)


def read(given: Any, number: int) -> Member:
    """Read one member.

    Args:
        given: an array, a tensor, or the path of an ``.npz`` (with its ``.pkl`` beside it, if there is one) or ``.npy``.
        number: its number among the members, for messages.

    Returns:
        The member.

    Raises:
        ArgumentError: it is something else.
    """
    if isinstance(given, torch.Tensor):
        values = given.detach().as_subclass(torch.Tensor).cpu()
        values = values.float() if values.dtype is torch.bfloat16 else values
        affine = getattr(given, "affine", None)  # of a MONAI MetaTensor
        geometry = {} if affine is None else {"affine": np.asarray(affine)}
        return Member(f"member {number}", values.numpy(), geometry)
    if isinstance(given, np.ndarray):
        return Member(f"member {number}", given)
    if isinstance(given, (str, Path)):
        return _from_file(Path(given), number)
    raise ArgumentError(
        f"member {number} is a {type(given).__name__}; members are arrays, tensors, .npz files of probabilities or folders "
        "of them.",
        path="members",
    )


def _from_file(path: Path, number: int) -> Member:
    name = f"member {number} ({path})"
    if path.suffix not in (".npz", ".npy") or not path.is_file():
        raise ArgumentError(
            f"{name} is no .npz or .npy file.",
            help="nnUNetv2_predict writes probabilities with --save_probabilities; folders of them are ensembled with other "
            "folders only.",
            path="members",
        )
    try:
        properties = _properties(path.with_suffix(".pkl"))
        values = np.load(path, allow_pickle=False)
        values = values if isinstance(values, np.ndarray) else _only_array(values, name)
    except (OSError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise SegmentationError(f"{name} cannot be read: {error}.", help="Export it anew.", path=str(path)) from error
    return Member(name, values, _geometry(properties), properties)


def _only_array(file: Any, name: str) -> np.ndarray:
    with file:
        keys = list(file.files)
        for key in ("probabilities", "softmax"):
            if key in keys:
                return file[key]
        if len(keys) == 1:
            return file[keys[0]]
    raise SegmentationError(
        f"{name} holds {keys} and no 'probabilities'.", help="Save them under this name.", path=name
    )


class _Unpickler(pickle.Unpickler):
    @override
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _HARMLESS:
            raise pickle.UnpicklingError(f"its properties name {module}.{name}, which is not loaded from a file")
        return super().find_class(module, name)


def _properties(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        found = _Unpickler(file).load()
    return found if isinstance(found, dict) else {}  # nnunetv2 2.6.4 saves the probabilities there by mistake


def _geometry(properties: Mapping[str, Any]) -> dict[str, np.ndarray]:
    found = {"spacing": properties.get("spacing")}
    itk = properties.get("sitk_stuff") or {}
    found |= {key: itk.get(key) for key in ("origin", "direction")}
    found["affine"] = (properties.get("nibabel_stuff") or {}).get("original_affine")
    return {key: np.asarray(value, np.float64) for key, value in found.items() if value is not None}


def check_match(first: Member, other: Member) -> None:
    """Refuse two members of one ensemble that are not about the same voxels and the same classes.

    Raises:
        SegmentationError: they are not.
    """
    if first.values.shape[0] != other.values.shape[0]:
        raise SegmentationError(
            f"{other.name} has {other.values.shape[0]} classes, {first.name} has {first.values.shape[0]}.",
            help=SAME_CLASSES,
            path=other.name,
        )
    if first.values.shape != other.values.shape:
        raise SegmentationError(
            f"{other.name} has shape {other.values.shape}, {first.name} has {first.values.shape}.",
            help="Members have to be on the same grid: resample before ensembling.",
            path=other.name,
        )
    for key in first.geometry.keys() & other.geometry.keys():
        a, b = first.geometry[key], other.geometry[key]
        if a.shape != b.shape or not np.allclose(a, b, rtol=1e-4, atol=1e-5):
            raise SegmentationError(
                f"{other.name} has {key} {b.tolist()}, {first.name} has {a.tolist()}: they are not about the same voxels.",
                help="Resample before ensembling.",
                path=other.name,
            )

"""Ensembling where it belongs: probabilities are averaged once, and nothing is activated again."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from typing_extensions import override

from dpfix.errors import ArgumentError, SegmentationError
from dpfix.segmentation.members import Member, check_match, read
from dpfix.segmentation.values import check_kind, check_probabilities


def ensemble_probabilities(
    members: Iterable[Any], *, kind: str = "regions", weights: Sequence[float] | None = None
) -> Any:
    """Average the probabilities of several models.

    The mean is taken in float32, in the order of the members, as nnunetv2 2.8.1 takes it: results are bit-identical.

    Args:
        members: one per model: an array or tensor ``[classes, *spatial]``, an ``.npz`` that nnU-Net exported, or (all of
            them) a folder of such files with one per case.
        kind: ``"regions"`` (overlapping, a sigmoid each) or ``"labels"`` (one softmax).
        weights: weight of every member; equal if not given.

    Returns:
        ``[classes, *spatial]``: a tensor on the first member's device if all members are tensors, else an array. For
        folders, :class:`EnsembledCases`, which reads and averages one case at a time.

    Raises:
        ArgumentError: a member, the kind or the weights cannot be used.

    >>> ensemble_probabilities([np.array([[0.25, 0.5]]), np.array([[0.75, 0.0]])])
    array([[0.5 , 0.25]], dtype=float32)
    """
    check_kind(kind)
    given: list[Any] = [members] if isinstance(members, (str, Path)) else list(members)
    weights = _checked_weights(weights, len(given))
    folders = [isinstance(m, (str, Path)) and Path(m).is_dir() for m in given]
    if all(folders):
        return EnsembledCases([Path(m) for m in given], kind=kind, weights=weights)
    mean, _ = average(given, kind, weights)
    if all(isinstance(m, torch.Tensor) for m in given):
        return torch.from_numpy(mean).to(given[0].device)
    return mean


def _checked_weights(weights: Sequence[float] | None, members: int) -> Sequence[float] | None:
    if not members:
        raise ArgumentError("members is empty: an ensemble needs at least one model's probabilities.", path="members")
    if weights is None:
        return None
    values = [float(w) for w in weights]
    if len(values) != members or any(not math.isfinite(w) or w < 0 for w in values) or not sum(values):
        raise ArgumentError(
            f"weights={values} for {members} members: one finite weight per member is needed, none negative, not all 0.",
            path="weights",
        )
    return values


def average(given: Sequence[Any], kind: str, weights: Sequence[float] | None) -> tuple[np.ndarray, Member]:
    """The mean over members that are read one after another.

    Args:
        given: arrays, tensors or paths.
        kind: see :func:`ensemble_probabilities`.
        weights: see :func:`ensemble_probabilities`.

    Returns:
        The mean in float32, and the first member.
    """
    first = total = None
    for number, one in enumerate(given):
        member = read(one, number)
        check_probabilities(member.values, kind=kind, name=member.name)
        if first is None or total is None:
            first, total = member, member.values.astype(np.float32)
            total *= 1 if weights is None else weights[0]
            continue
        check_match(first, member)
        total += member.values if weights is None else member.values * weights[number]
    assert first is not None and total is not None
    total /= len(given) if weights is None else sum(weights)
    return total, first


class EnsembledCases(Mapping[str, np.ndarray]):
    """The averaged probabilities of every case of some folders, each read when it is asked for.

    Args:
        folders: one folder per model, with one ``.npz`` per case.
        kind: see :func:`ensemble_probabilities`.
        weights: see :func:`ensemble_probabilities`; one per folder.

    Raises:
        SegmentationError: a folder is empty or lacks a case that another one has.
    """

    def __init__(self, folders: Sequence[Path], *, kind: str, weights: Sequence[float] | None = None) -> None:
        self.folders, self.kind, self.weights = tuple(folders), kind, weights
        cases = [{path.name.removesuffix(".npz") for path in folder.glob("*.npz")} for folder in folders]
        everything = sorted(set().union(*cases))
        for folder, found in zip(folders, cases, strict=True):
            lacking = [case for case in everything if case not in found]
            if lacking or not found:
                what = f"no case {lacking[0]!r} ({len(lacking)} missing)" if found else "no .npz at all"
                raise SegmentationError(
                    f"folder {folder} has {what}.",
                    help="Every model has to have predicted every case, with --save_probabilities.",
                    path=str(folder),
                )
        self._cases = everything

    @override
    def __getitem__(self, case: str) -> np.ndarray:
        return self.case(case)[0]

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._cases)

    @override
    def __len__(self) -> int:
        return len(self._cases)

    def case(self, case: str) -> tuple[np.ndarray, Member]:
        """Read and average one case.

        Args:
            case: name of a file in the folders, without its ending.

        Returns:
            The mean, and the first model's prediction with its properties.

        Raises:
            KeyError: there is no such case.
        """
        if case not in self._cases:
            raise KeyError(case)
        return average([folder / f"{case}.npz" for folder in self.folders], self.kind, self.weights)


@overload
def segmentation_from_probabilities(
    p: np.ndarray, *, regions_class_order: Sequence[int] | None = None
) -> np.ndarray: ...
@overload
def segmentation_from_probabilities(
    p: torch.Tensor, *, regions_class_order: Sequence[int] | None = None
) -> torch.Tensor: ...
def segmentation_from_probabilities(p: Any, *, regions_class_order: Sequence[int] | None = None) -> Any:
    """Turn probabilities into a label map.

    Regions are written one after another where their probability is above one half, later ones over earlier ones; of
    labels the most probable one is taken. Nothing is activated.

    Args:
        p: ``[classes, *spatial]``.
        regions_class_order: for regions, the label that each of them writes, in the order of the classes; ``None`` for
            labels. nnU-Net's ``dataset.json`` has it under this name.

    Returns:
        ``[*spatial]`` of the same type as ``p``; for regions uint16 (tensors: int16), else int64.

    Raises:
        SegmentationError: ``p`` does not hold probabilities, or the order does not fit its classes.

    >>> segmentation_from_probabilities(np.array([[0.9, 0.8, 0.1], [0.2, 0.9, 0.3]]), regions_class_order=[1, 2])
    array([1, 2, 0], dtype=uint16)
    """
    values = read(p, 0).values
    if regions_class_order is None:
        check_probabilities(values, kind="labels")
        return p.argmax(0)
    check_probabilities(values, kind="regions")
    if len(regions_class_order) != values.shape[0]:
        raise SegmentationError(
            f"regions_class_order={list(regions_class_order)} names {len(regions_class_order)} labels for the "
            f"{values.shape[0]} regions of p.",
            help="It needs one label per region, in their order.",
            path="regions_class_order",
        )
    if isinstance(p, torch.Tensor):
        out: Any = torch.zeros(p.shape[1:], dtype=torch.int16, device=p.device)
    else:
        out = np.zeros(p.shape[1:], dtype=np.uint16)
    for region, label in enumerate(regions_class_order):
        out[p[region] > 0.5] = label
    return out

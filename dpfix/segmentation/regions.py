"""Overlapping regions (whole tumour, core, enhancing) to and from label maps, and their Dice per case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dpfix.errors import SegmentationError


class Regions:
    """Regions as unions of labels.

    Labels that are in the same regions merge: they come back as one of them. The way from regions to labels and back is exact
    for the regions of every label map; that is tried on construction, label by label.

    Args:
        labels: for every region the labels it consists of, larger regions first; a label may be in several regions.
        order: the label that each region writes when a label map is made of regions, later regions over earlier ones
            (nnU-Net's ``regions_class_order``). If not given, the first of its labels that no later region has; where later
            ones have them all, which no label map shows, the one in the fewest regions.
        ignore: the label of voxels that nobody has labelled (nnU-Net's ``ignore``), in no region and no background either.

    Attributes:
        merged: labels that come back as another one, and as which.

    Raises:
        SegmentationError: regions of a label map cannot be got back from the labels that this order writes.

    >>> tumour = Regions({"whole": (1, 2, 3), "core": (2, 3), "enhancing": (3,)})
    >>> tumour.order
    (1, 2, 3)
    >>> tumour.from_labels(torch.tensor([[0, 1, 2, 3]])).long().tolist()
    [[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]]
    >>> Regions({"whole": (1, 2, 3, 4), "core": (1, 2, 3), "enhancing": (1,)}).merged
    {3: 2}
    """

    def __init__(
        self, labels: Mapping[str, Sequence[int]], order: Sequence[int] | None = None, ignore: int | None = None
    ) -> None:
        self.labels = {name: tuple(int(v) for v in values) for name, values in labels.items()}
        self.ignore = ignore
        if not self.labels or any(not values or 0 in values for values in self.labels.values()) or ignore == 0:
            raise SegmentationError(
                f"labels={dict(labels)}, ignore={ignore}: every region needs at least one label, and 0 is the background, in no "
                "region and not ignored.",
                path="labels",
            )
        self._check_ignored()
        self.order = tuple(int(v) for v in order) if order is not None else self._derived_order()
        self._check_order()
        self.merged = self._checked_round_trip()

    @classmethod
    def from_dataset_json(cls, dataset: Mapping[str, Any]) -> Regions:
        """The regions of an nnU-Net data set.

        Args:
            dataset: content of ``dataset.json``.

        Returns:
            Its regions; an ordinary label is a region of one label, ``ignore`` is none.

        Raises:
            SegmentationError: it has no ``regions_class_order``, or other labels than nnU-Net 2 has.
        """
        named = dataset["labels"]
        ignore = named.get("ignore")
        labels = {name: _labels(name, value) for name, value in named.items() if name != "ignore"}
        labels = {name: values for name, values in labels.items() if set(values) != {0}}
        if dataset.get("regions_class_order") is None:
            raise SegmentationError(*_no_order(cls, named, labels, ignore), path="dataset.json")
        return cls(labels, dataset["regions_class_order"], ignore)

    def _regions_of(self, label: int) -> list[str]:
        return [name for name, values in self.labels.items() if label in values]

    def _derived_order(self) -> tuple[int, ...]:
        def claims(name: str, label: int) -> tuple[bool, int]:
            regions = self._regions_of(label)
            return regions[-1] != name, len(regions) * (regions[-1] != name)

        return tuple(min(values, key=lambda v: claims(name, v)) for name, values in self.labels.items())

    def _check_ignored(self) -> None:
        if self.ignore is not None and (regions := self._regions_of(self.ignore)):
            raise SegmentationError(
                f"label {self.ignore} is to be ignored, and region {regions[0]!r} = {self.labels[regions[0]]} has it.",
                help="Take it out of the region, or name another label in ignore=.",
                path="ignore",
            )

    def _check_order(self) -> None:
        if len(self.order) != len(self.labels):
            raise SegmentationError(
                f"order={self.order} names {len(self.order)} labels for {len(self.labels)} regions.", path="order"
            )
        for (name, values), writes in zip(self.labels.items(), self.order, strict=True):
            if writes not in values:
                raise SegmentationError(
                    f"region {name!r} writes label {writes}, which it does not have: {values}.",
                    help="Every entry of order= is a label of the region at its place.",
                    path="order",
                )

    def _checked_round_trip(self) -> dict[int, int]:
        """Every label, as it comes back from its regions: which is another than it was, in the same regions."""
        written = dict(zip(self.labels, self.order, strict=True))
        merged: dict[int, int] = {}
        for label in sorted(set().union(*self.labels.values())):
            regions = self._regions_of(label)
            back = written[regions[-1]]
            if self._regions_of(back) != regions:
                raise SegmentationError(
                    f"label {label} comes back as {back}, the label that {regions[-1]!r} writes: {label} is in "
                    f"{', '.join(regions)}, and {back} in {', '.join(self._regions_of(back))}. Regions {self.labels} are written "
                    f"in this order as {self.order}.",
                    help="List larger regions first, or change order=; an overlap of two regions that neither holds needs a "
                    "region of its own after both.",
                    path="order",
                )
            if back != label:
                merged[label] = back
        return merged

    def from_labels(self, labels: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """One map per region, for training on regions.

        Args:
            labels: a label map with one channel: ``[1, *spatial]``, or ``[samples, 1, *spatial]`` with ``dim=1``.
            dim: the channel dimension.

        Returns:
            The same with one channel per region, 0.0 or 1.0. If there is a label to ignore, one channel more, the last, has 1.0
            where it is, as in nnU-Net; :class:`dpfix.segmentation.LabelledVoxelsLoss` reads it.

        Raises:
            SegmentationError: there is not exactly one channel.
        """
        if labels.dim() <= dim or labels.shape[dim] != 1:
            raise SegmentationError(
                f"labels has shape {tuple(labels.shape)}, and not one channel in dimension {dim}.",
                help="Pass [1, *spatial], or [samples, 1, *spatial] with dim=1.",
                path="labels",
            )
        channels = [*self.labels.values(), *([(self.ignore,)] if self.ignore is not None else [])]
        # by comparison: labels of images are often floats
        parts = [torch.stack([labels == v for v in values]).any(0) for values in channels]
        return torch.cat(parts, dim).to(torch.float32)

    def to_labels(self, regions: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """The label map that regions stand for.

        Args:
            regions: one channel per region; probabilities, or 0 and 1. With a label to ignore there may be one channel more, the
                last, which writes it.
            dim: the channel dimension.

        Returns:
            int64, with one channel.

        Raises:
            SegmentationError: the number of channels is not that of the regions.
        """
        writes = self.order
        if self.ignore is not None and regions.shape[dim] == len(writes) + 1:
            writes = (*writes, self.ignore)
        if regions.shape[dim] != len(writes):
            raise SegmentationError(
                f"regions has {regions.shape[dim]} channels in dimension {dim}; there are {len(self.order)} regions "
                f"({', '.join(self.labels)}).",
                path="regions",
            )
        out = torch.zeros_like(regions.narrow(dim, 0, 1), dtype=torch.int64)
        for number, label in enumerate(writes):
            out = torch.where(regions.narrow(dim, number, 1) > 0.5, label, out)
        return out


def _labels(name: str, value: Any) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if not values or not all(isinstance(v, int) for v in values):
        raise SegmentationError(
            f"labels has {name!r}: {value!r}, which is no label.",
            help='nnU-Net 2 has names, with numbers or lists of them: "labels": {"background": 0, "tumour": [1, 2]}.',
            path="dataset.json",
        )
    return values


def _no_order(cls: type[Regions], named: Any, labels: Any, ignore: int | None) -> tuple[str, str, str]:
    """Fact, reason and way out where ``regions_class_order`` is missing."""
    region = next((name for name, values in labels.items() if len(values) > 1), None)
    if region is None:
        return (
            "dataset.json has no regions_class_order, and no regions either: each of its labels stands for itself.",
            "A model of labels ends in one softmax.",
            "Use kind='labels'; to train on one map per label, pass Regions({'name': (label,), ...}).",
        )
    fact = f"dataset.json has region {region!r} = {list(named[region])}, and no regions_class_order"
    why = "Which label a region writes over those before it is not known, and nnU-Net stops."
    try:
        order = list(cls(labels, None, ignore).order)
    except SegmentationError as error:
        return f"{fact}.", f"{why} None fits in this order of the regions:", str(error)
    return (
        f"{fact}.",
        why,
        f'Add "regions_class_order": {order} to dataset.json, in which later regions are written over earlier ones.',
    )


def region_dice(
    prediction: torch.Tensor,
    target: torch.Tensor,
    *,
    empty: float = float("nan"),
    ignored: torch.Tensor | None = None,
) -> torch.Tensor:
    """Dice of every region of every case, no mean over the batch.

    Args:
        prediction: ``[samples, regions, *spatial]``; probabilities, or 0 and 1.
        target: the same of the truth.
        empty: what a region gets that is in neither.
        ignored: ``[samples, 1, *spatial]``, not 0 where voxels do not count.

    Returns:
        ``[samples, regions]``, ``2 |A and B| / (|A| + |B|)``.

    Raises:
        SegmentationError: the shapes do not fit.

    >>> region_dice(torch.tensor([[[0.9, 0.6, 0.1]]]), torch.tensor([[[1.0, 0.0, 0.0]]])).round(decimals=3)
    tensor([[0.6670]])
    """
    if prediction.shape != target.shape or prediction.dim() < 3:
        raise SegmentationError(
            f"prediction has shape {tuple(prediction.shape)}, target {tuple(target.shape)}; both have to be "
            "[samples, regions, *spatial].",
            path="prediction",
        )
    a, b = prediction.flatten(2) > 0.5, target.flatten(2) > 0.5
    if ignored is not None:
        if ignored.shape != (len(target), 1, *target.shape[2:]):
            raise SegmentationError(
                f"ignored has shape {tuple(ignored.shape)}; it has to be [samples, 1, *spatial] of target, "
                f"{tuple(target.shape)}.",
                path="ignored",
            )
        counts = ignored.flatten(2) == 0
        a, b = a & counts, b & counts
    both, either = (a & b).sum(2), a.sum(2) + b.sum(2)
    dice = 2 * both / either.clamp(min=1)
    return torch.where(either == 0, empty, dice.double()).to(torch.float32)

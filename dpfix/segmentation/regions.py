"""Overlapping regions (whole tumour, core, enhancing) to and from label maps, and their Dice per case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dpfix.errors import SegmentationError


class Regions:
    """Regions as unions of labels.

    Args:
        labels: for every region the labels it consists of, larger regions first; a label may be in several regions.
        order: the label that each region writes when a label map is made of regions, later regions over earlier ones
            (nnU-Net's ``regions_class_order``). If not given, the one label that no later region has.

    Raises:
        SegmentationError: a label map cannot be got back from these regions in this order.

    >>> tumour = Regions({"whole": (1, 2, 3), "core": (2, 3), "enhancing": (3,)})
    >>> tumour.order
    (1, 2, 3)
    >>> tumour.from_labels(torch.tensor([[0, 1, 2, 3]])).long().tolist()
    [[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]]
    """

    def __init__(self, labels: Mapping[str, Sequence[int]], order: Sequence[int] | None = None) -> None:
        self.labels = {name: tuple(int(v) for v in values) for name, values in labels.items()}
        if not self.labels or any(not values or 0 in values for values in self.labels.values()):
            raise SegmentationError(
                f"labels={dict(labels)}: every region needs at least one label, and 0 is the background, in no region.",
                path="labels",
            )
        self.order = tuple(order) if order is not None else self._derived_order()
        if len(self.order) != len(self.labels):
            raise SegmentationError(
                f"order={self.order} names {len(self.order)} labels for {len(self.labels)} regions.", path="order"
            )
        self._check_round_trip()

    @classmethod
    def from_dataset_json(cls, dataset: Mapping[str, Any]) -> Regions:
        """The regions of an nnU-Net data set.

        Args:
            dataset: content of ``dataset.json``.

        Returns:
            Its regions; an ordinary label is a region of one label.

        Raises:
            SegmentationError: it has no ``regions_class_order``.
        """
        if "regions_class_order" not in dataset:
            raise SegmentationError(
                "dataset.json has no regions_class_order: its labels are no regions.", path="dataset.json"
            )
        labels = {
            name: tuple(value) if isinstance(value, (list, tuple)) else (value,)
            for name, value in dataset["labels"].items()
            if name not in ("background", "ignore")
        }
        return cls(labels, dataset["regions_class_order"])

    def _derived_order(self) -> tuple[int, ...]:
        regions = list(self.labels.items())
        order = []
        for number, (name, values) in enumerate(regions):
            own = [v for v in values if not any(v in later for _, later in regions[number + 1 :])]
            if len(own) != 1:
                raise SegmentationError(
                    f"region {name!r} = {values} has the labels {own} to itself among those that follow it; the label it "
                    "writes is not clear.",
                    help="List larger regions first, or pass order=.",
                    path="order",
                )
            order += own
        return tuple(order)

    def _check_round_trip(self) -> None:
        for label in sorted(set().union(*self.labels.values())):
            back = 0
            for values, writes in zip(self.labels.values(), self.order, strict=True):
                back = writes if label in values else back
            if back != label:
                raise SegmentationError(
                    f"label {label} comes back as {back}: regions {self.labels}, written in this order as {self.order}, do "
                    "not tell all labels apart.",
                    help="List larger regions first, or change order=.",
                    path="order",
                )

    def from_labels(self, labels: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """One map per region, for training on regions.

        Args:
            labels: a label map with one channel: ``[1, *spatial]``, or ``[samples, 1, *spatial]`` with ``dim=1``.
            dim: the channel dimension.

        Returns:
            The same with one channel per region, 0.0 or 1.0.

        Raises:
            SegmentationError: there is not exactly one channel.
        """
        if labels.dim() <= dim or labels.shape[dim] != 1:
            raise SegmentationError(
                f"labels has shape {tuple(labels.shape)}, and not one channel in dimension {dim}.",
                help="Pass [1, *spatial], or [samples, 1, *spatial] with dim=1.",
                path="labels",
            )
        # by comparison: labels of images are often floats
        parts = [sum(labels == v for v in values) for values in self.labels.values()]
        return torch.cat([part.to(torch.float32) for part in parts if isinstance(part, torch.Tensor)], dim)

    def to_labels(self, regions: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """The label map that regions stand for.

        Args:
            regions: one channel per region; probabilities, or 0 and 1.
            dim: the channel dimension.

        Returns:
            int64, with one channel.

        Raises:
            SegmentationError: the number of channels is not that of the regions.
        """
        if regions.shape[dim] != len(self.order):
            raise SegmentationError(
                f"regions has {regions.shape[dim]} channels in dimension {dim}; there are {len(self.order)} regions "
                f"({', '.join(self.labels)}).",
                path="regions",
            )
        out = torch.zeros_like(regions.narrow(dim, 0, 1), dtype=torch.int64)
        for number, label in enumerate(self.order):
            out = torch.where(regions.narrow(dim, number, 1) > 0.5, label, out)
        return out


def region_dice(prediction: torch.Tensor, target: torch.Tensor, *, empty: float = float("nan")) -> torch.Tensor:
    """Dice of every region of every case, no mean over the batch.

    Args:
        prediction: ``[samples, regions, *spatial]``; probabilities, or 0 and 1.
        target: the same of the truth.
        empty: what a region gets that is in neither.

    Returns:
        ``[samples, regions]``, ``2 |A and B| / (|A| + |B|)``.

    Raises:
        SegmentationError: the shapes differ.

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
    both, either = (a & b).sum(2), a.sum(2) + b.sum(2)
    dice = 2 * both / either.clamp(min=1)
    return torch.where(either == 0, empty, dice.double()).to(torch.float32)

"""Losses over the voxels that somebody has labelled, of every sample alone."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dpfix.errors import SegmentationError
from dpfix.repair.per_sample_loss import PerSampleLoss


class LabelledVoxelsLoss(PerSampleLoss):
    """Any loss over voxels, of those that are not ignored; of every sample alone, then averaged over the samples.

    The voxels to ignore are taken out of output and target before the criterion sees them. What is left of a sample is its own
    mean: how many voxels of other samples are labelled changes nothing in it, as differential privacy needs it
    (``ignore_index`` divides by the labelled voxels of the whole batch). A sample without any labelled voxel contributes 0.

    Args:
        criterion: a loss that takes voxels in any order (Dice, cross-entropy, focal, Tversky): it gets outputs
            ``[1, channels, voxels]`` and targets ``[1, ..., voxels]``.
        ignore: the label to ignore in targets of labels, ``[samples, *spatial]`` or ``[samples, 1, *spatial]``. If not given,
            targets are regions with one channel more than the output, which says where to ignore, as
            :meth:`dpfix.segmentation.Regions.from_labels` and nnU-Net make them.

    >>> loss = LabelledVoxelsLoss(torch.nn.CrossEntropyLoss(), ignore=9)
    >>> two = torch.tensor([[[2.0, 0.0], [0.0, 1.0]], [[2.0, 5.0], [0.0, 5.0]]])  # two samples of two voxels
    >>> round(float(loss(two, torch.tensor([[0, 1], [0, 9]]))), 4)
    0.1735
    """

    def __init__(self, criterion: Callable[..., torch.Tensor], ignore: int | None = None) -> None:
        super().__init__(_OfLabelled(criterion, ignore))


class _OfLabelled(torch.nn.Module):
    """The criterion of one sample, of its labelled voxels."""

    def __init__(self, criterion: Callable[..., torch.Tensor], ignore: int | None) -> None:
        super().__init__()
        self.criterion, self.ignore = criterion, ignore

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        output, target = output.as_subclass(torch.Tensor), target.as_subclass(torch.Tensor)
        if self.ignore is None:
            counts, target = self._by_channel(output, target)
        else:
            counts = self._by_label(output, target) != self.ignore
        if not bool(counts.any()):
            return output.sum() * 0
        return self.criterion(output[..., counts], target[..., counts])

    def _by_channel(self, output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if (
            target.dim() != output.dim()
            or target.shape[1] != output.shape[1] + 1
            or target.shape[2:] != output.shape[2:]
        ):
            raise SegmentationError(
                f"the output of a sample has shape {tuple(output.shape)}, its target {tuple(target.shape)}; regions with voxels "
                "to ignore have one channel more, the last, which says where they are.",
                help="Make targets with Regions(..., ignore=label).from_labels, or pass ignore= for targets of labels.",
                path="criterion",
            )
        return target[0, -1] == 0, target[:, :-1]

    def _by_label(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        spatial = output.shape[2:]
        if target.shape[1:] == spatial:
            return target[0]
        if target.shape[1:] != (1, *spatial):
            raise SegmentationError(
                f"the output of a sample has shape {tuple(output.shape)}, its target {tuple(target.shape)}; labels have one "
                "channel, or no dimension of channels.",
                help="Leave ignore= out for regions with a channel that says where to ignore.",
                path="criterion",
            )
        return target[0, 0]

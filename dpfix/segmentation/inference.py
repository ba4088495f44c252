"""From a trained model and a whole image to probabilities, activated once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dpfix.errors import SegmentationError
from dpfix.segmentation.values import check_kind, check_probabilities

Inferer = Callable[[torch.Tensor, Callable[..., torch.Tensor]], Any]


def predict_probabilities(
    model: nn.Module,
    image: torch.Tensor,
    *,
    kind: str = "regions",
    inferer: Inferer | None = None,
    logits: bool = True,
) -> torch.Tensor:
    """Predict one image or a batch, windows put together as logits, and activate the result once.

    Args:
        model: a trained model, private or not; it is put into evaluation mode for the prediction only.
        image: ``[samples, channels, *spatial]``.
        kind: ``"regions"`` (a sigmoid) or ``"labels"`` (a softmax over the classes).
        inferer: how windows of the image become one prediction, for example MONAI's
            ``SlidingWindowInferer(roi_size, overlap=0.5, mode="gaussian")``; the whole image at once if not given.
        logits: whether the model returns logits; ``False`` for one that ends in its activation.

    Returns:
        ``[samples, classes, *spatial]`` in float32: what :func:`dpfix.segmentation.ensemble_probabilities` takes, sample
        by sample.

    Raises:
        SegmentationError: the model returns probabilities although ``logits`` is true, or none although it is false.
    """
    check_kind(kind)
    training = {m: m.training for m in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            out = inferer(image, _main_output(model)) if inferer is not None else _main_output(model)(image)
    finally:
        for m, mode in training.items():
            m.training = mode
    out = out.as_subclass(torch.Tensor).float()
    if not logits:
        for number, sample in enumerate(out):
            check_probabilities(sample.cpu().numpy(), kind=kind, name=f"output {number} of {type(model).__name__}")
        return out
    if float(out.min()) >= 0 and float(out.max()) <= 1:
        raise SegmentationError(
            f"{type(model).__name__} returns values from {float(out.min()):.4g} to {float(out.max()):.4g}: probabilities, as it "
            "seems.",
            "A second activation would make every voxel undecided.",
            "Pass logits=False.",
            path="logits",
        )
    return out.sigmoid() if kind == "regions" else out.softmax(1)


def _main_output(model: nn.Module) -> Callable[..., torch.Tensor]:
    """The model without the lower-resolution outputs of deep supervision."""

    def run(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = model(*args, **kwargs)
        while isinstance(out, (tuple, list)):
            out = out[0]
        return out

    return run

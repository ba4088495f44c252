"""Public families beside MONAI: transformers, timm, torchvision, and kinds of models written in plain torch."""

from __future__ import annotations

from typing import Any

import torch

_OPERATORS = (
    "nms", "qnms", "roi_align", "_roi_align_backward", "roi_pool", "_roi_pool_backward", "ps_roi_align",
    "_ps_roi_align_backward", "ps_roi_pool", "_ps_roi_pool_backward", "deform_conv2d", "_deform_conv2d_backward",
)  # fmt: skip


def declare_operators() -> Any:
    """Declare torchvision's own operators where they were built for another torch, so that it can be imported.

    No network here calls them.

    Returns:
        What has to be kept for them to stay, or ``None``.
    """
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return None
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in _OPERATORS:
            library.define(f"{name}(Tensor a) -> Tensor")
        return library


_KEPT = declare_operators()

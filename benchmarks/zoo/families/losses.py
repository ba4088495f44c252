"""Losses that need nothing but torch."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


def classify(model: nn.Module, batch: Any) -> Tensor:
    """Cross-entropy of the output, or of the mean of several heads."""
    out = model(batch[0])
    return F.cross_entropy(sum(out) / len(out) if isinstance(out, tuple) else out, batch[1])


def by_pixel(model: nn.Module, batch: Any) -> Tensor:
    """Cross-entropy of every pixel, of a network that returns a dictionary or a tensor."""
    out = model(batch[0])
    return F.cross_entropy(out["out"] if isinstance(out, dict) else out, batch[1][:, 0])

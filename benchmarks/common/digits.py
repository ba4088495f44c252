"""Scikit-learn's digits: 1797 images of 8 x 8 pixels."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor


def digits(seed: int) -> tuple[Tensor, Tensor]:
    """Images from 0 to 1 with a channel, and their classes, in an order drawn from the seed."""
    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(seed))
    images = torch.as_tensor(found.images, dtype=torch.float32)[:, None] / 16
    return images[order], torch.as_tensor(found.target)[order]

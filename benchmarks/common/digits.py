"""Scikit-learn's digits: 1797 images of 8 x 8 pixels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn


def digits(seed: int) -> tuple[Tensor, Tensor]:
    """Images from 0 to 1 with a channel, and their classes, in an order drawn from the seed."""
    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(seed))
    images = torch.as_tensor(found.images, dtype=torch.float32)[:, None] / 16
    return images[order], torch.as_tensor(found.target)[order]


def epoch(model: nn.Module, optimizer: Any, batches: Iterable[Any]) -> None:
    """A pass with cross entropy, private or not."""
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The share of images that the model, in evaluation mode from here on, puts into their class."""
    model.eval()
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())

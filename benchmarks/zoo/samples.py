"""The samples of the networks: a sample is a tuple of tensors, drawn from a generator.

Noise levels, noise and masks that a script draws for a sample are part of the sample, so that its gradient is one definite thing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

Sample = Callable[[Generator], tuple[Any, ...]]


def image(*shape: int, classes: int = 0) -> Sample:
    """An image; with ``classes`` also a label."""

    def draw(g: Generator) -> tuple[Any, ...]:
        x = torch.randn(*shape, generator=g) * (0.5 + torch.rand((), generator=g))
        return (x, torch.randint(classes, (), generator=g)) if classes else (x,)

    return draw


def masked(channels: int, *size: int, classes: int = 2) -> Sample:
    """An image and a mask of as many voxels."""
    return lambda g: (*image(channels, *size)(g), torch.randint(classes, (1, *size), generator=g))


def layout_and(sample: Sample, classes: int, *size: int) -> Sample:
    """A sample and a one-hot map of regions."""

    def draw(g: Generator) -> tuple[Any, ...]:
        regions = F.one_hot(torch.randint(classes, size, generator=g), classes).movedim(-1, 0).float()
        return (*sample(g), regions)

    return draw


def both(*samples: Sample) -> Sample:
    return lambda g: tuple(part for sample in samples for part in sample(g))


def tokens(vocabulary: int, length: int) -> Sample:
    return lambda g: (torch.randint(vocabulary, (length,), generator=g),)


def noised(*shape: int) -> Sample:
    """An image, the noise to be found, and the time step it belongs to."""
    return lambda g: (*image(*shape)(g), torch.randn(*shape, generator=g), torch.randint(1000, (), generator=g))


def pair(channels: int, *size: int) -> Sample:
    """Two smooth images to be registered: a blob, and the same blob elsewhere."""

    def draw(g: Generator) -> tuple[Any, ...]:
        grid = torch.stack(torch.meshgrid(*(torch.linspace(-1, 1, n) for n in size), indexing="ij"))
        at = (torch.rand(2, len(size), generator=g) - 0.5).reshape(2, len(size), *(1 for _ in size))
        moving, fixed = (torch.exp(-4 * (grid - a).square().sum(0)).expand(channels, *size) for a in at)
        return moving.clone(), fixed.clone()

    return draw


def clicks(g: Generator) -> tuple[Any, ...]:
    shape = (1, 16, 16, 16)
    where = torch.randint(16, (2, 3), generator=g).float()
    return *image(*shape)(g), where, torch.tensor([1, 0]), torch.randint(2, shape, generator=g).float()


def three_masks(g: Generator) -> tuple[Any, ...]:
    return *image(1, 16, 16, 16)(g), torch.randint(2, (3, 16, 16, 16), generator=g).float()


def unequal(g: Generator) -> tuple[Any, ...]:
    height, width = (8 * int(torch.randint(1, 4, (), generator=g)) for _ in range(2))
    return image(1, height, width, classes=3)(g)


def lists(items: list[Any]) -> tuple[list[Any], Tensor]:
    return [item[0] for item in items], torch.stack([item[1] for item in items])

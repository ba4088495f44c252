"""Which ways to have the norms of per-sample gradients of a convolution's weight are worth trying."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from dpfix.engines.bookkeeping.linear import BYTE_COST

KEEP_RATIO = 2.0
"""Kept gradients may be this many times larger than the layer's input and output gradient, which they replace."""
SINGLY = 8
"""How much slower a grouped convolution is with one channel per group."""
PRODUCT = 20_000
"""Multiply-adds that cost as much time as one more matrix in a product of many pairs."""
WINDOW_COST = 40
"""Multiply-adds that cost as much time as one element of a strided window of a Gram matrix."""
WORTH_TRYING = 2.5
"""Ways whose cost is estimated at up to this many times the smallest estimate are tried."""
UNCACHED = 8
"""How much longer it takes to copy a number when the copies do not fit."""


@dataclass(frozen=True)
class Geometry:
    """Stride, zero padding and dilation per spatial dimension, and the groups.

    Attributes:
        stride: the stride.
        padding: zeros on both sides.
        dilation: distance of the kernel's elements.
        groups: groups of channels.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


@functools.lru_cache(4096)
def worth_trying(
    x: torch.Size, g: torch.Size, shape: torch.Size, geometry: Geometry, rows: int, cache: int
) -> tuple[str, ...]:
    """The ways whose cost is estimated at not much more than the smallest estimate.

    Args:
        x: shape of a row of the input, ``[channels, *in]``.
        g: shape of a row of the output gradient, ``[filters, *out]``.
        cache: numbers that can be copied and used without going to memory in between.

    Returns:
        Their names.
    """
    costs = _costs(x, g, shape, geometry, rows, cache)
    return tuple(sorted(name for name, cost in costs.items() if cost <= WORTH_TRYING * min(costs.values())))


def _costs(
    x: torch.Size, g: torch.Size, shape: torch.Size, geometry: Geometry, rows: int, cache: int
) -> dict[str, float]:
    """Multiply-adds per sample that take as long as each way, roughly."""
    size, kernel = shape.numel(), shape[2:]
    out, inside = g[1:].numel() * rows, [n + 2 * p for n, p in zip(x[1:], geometry.padding, strict=True)]
    high, padded = inside[0], rows * math.prod(inside)
    patches = out * kernel.numel() * x[0]
    moved = patches * (1 if patches <= cache else UNCACHED) + size
    singly = SINGLY if geometry.groups == x[0] == g[0] > 1 else 1
    again = singly * out * size  # the weight gradient of the batch
    costs: dict[str, float] = {
        "norms_by_groups": singly * (max(out, 8 * BYTE_COST) + 2 * BYTE_COST) * size + again,
        "norms_by_patches": out * size + moved * BYTE_COST + again,
    }
    moves = padded**2 + 2 * out**2
    for dim, (length, offsets) in enumerate(zip(g[1:], kernel, strict=True)):
        inside[dim] = length
        moves += offsets * (rows * math.prod(inside)) ** 2
    costs["norms_by_gram"] = padded**2 * x[0] + out**2 * g[0] + geometry.groups * moves * WINDOW_COST + again
    if size <= KEEP_RATIO * rows * (x.numel() + g.numel()):
        # A grouped convolution works on one sample's few positions at a time: slower by as much as they are few.
        costs["keep_by_groups"] = singly * (max(out, 8 * BYTE_COST) + 3 * BYTE_COST) * size
        if len(kernel) == 2 and singly > 1:
            lines, columns = g[1:]
            each = high * kernel[1] * (lines * columns + (lines + columns) * BYTE_COST) + PRODUCT
            costs["keep_by_lines"] = rows * g[0] * each
        costs["keep_by_patches"] = out * size + (moved + size) * BYTE_COST
    return costs

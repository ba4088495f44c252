"""Per-sample gradients of depthwise convolutions in two dimensions, by matrix products."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dpfix.engines.bookkeeping.blocks import at_once, in_a_row, parted
from dpfix.engines.bookkeeping.convolution_costs import Geometry


def by_lines(x: torch.Tensor, g: torch.Tensor, kernel: Sequence[int], geometry: Geometry) -> torch.Tensor:
    """Products of lines of the input with lines of the output gradient.

    ``sum_y (sum_x X[s y + d i, s x + d j] g[y, x])`` for every channel: the inner sum is a matrix product, of all lines with
    all lines, and the outer one a diagonal of it. There are more multiplications than there have to be; a grouped
    convolution with one channel per group is no matrix product, and so slow on a processor that this is faster.

    Args:
        x: padded, shape ``[rows, channels, height, width]``.
        g: shape ``[rows, channels, lines, columns]``.
        kernel: its two sizes.
        geometry: stride and dilation.

    Returns:
        Shape ``[rows * channels, *kernel]``.
    """
    (high, wide), (down, along), (apart, beside) = kernel, geometry.stride, geometry.dilation
    height, width, lines, columns = *x.shape[2:], *g.shape[2:]
    x, g = x.reshape(-1, height, width).contiguous(), g.reshape(-1, lines, columns)
    step = at_once(x.device, height * wide * (columns + lines), len(x))
    found = []
    for some, back in zip(parted(x, step), parted(g, step), strict=True):
        size, steps = (len(some), height, wide, columns), (height * width, width, beside, along)
        windows = some.as_strided(size, steps).reshape(len(some), height * wide, columns)
        products, line = torch.bmm(windows, back.mT), wide * lines
        steps = (height * line, apart * line, lines, down * line + 1)
        found.append(products.as_strided((len(some), high, wide, lines), steps).sum(3))
    return in_a_row(found)

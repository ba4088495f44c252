"""Per-sample gradients of convolution weights.

The gradient of a weight ``W[o, c, k]`` correlates what went in with what came back, sample by sample:
``sum_t g[o, t] x[c, stride t + dilation k]``. All samples at once are one grouped convolution gradient with
``samples * groups`` groups (Rochette et al., "Efficient Per-Example Gradient Computations in Convolutional Neural
Networks", 2019); for small outputs its norm is had from Gram matrices (Bu et al., "Scalable and Efficient Training of
Large Convolutional Neural Networks with Differential Privacy", 2022), here without unfolding: the Gram matrix of the
input is summed over the kernel's offsets.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch

from dpfix.engines.bookkeeping.contributions import Contribution, Kept, full_precision
from dpfix.engines.bookkeeping.linear import BYTE_COST, CALL_COST, outer

KEEP_RATIO = 3.0
"""Kept gradients may be this many times larger than the layer's input and output gradient."""
WINDOW_COST = 40
"""Multiply-adds that cost as much time as one element of a strided window of a Gram matrix."""


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


class Correlation:
    """The gradient of a convolution's weight by its factors.

    Args:
        x: shape ``[samples, channels, *in]``.
        g: shape ``[samples, filters, *out]``.
        shape: shape of the weight, ``[filters, channels / groups, *kernel]``.
        geometry: stride, padding, dilation, groups.
    """

    def __init__(self, x: torch.Tensor, g: torch.Tensor, shape: torch.Size, geometry: Geometry) -> None:
        self.x, self.g, self.shape, self.geometry = full_precision(x), full_precision(g), shape, geometry

    def squared_norms(self) -> torch.Tensor:
        """``sum_tt' G[t, t'] sum_k X[s t + d k, s t' + d k]`` with the Gram matrices G and X over the channels.

        Returns:
            Shape ``[samples]``.
        """
        if self._gram_cost() > self._product_cost():
            return self._norms_one_by_one()
        groups, samples = self.geometry.groups, len(self.x)
        pads = [p for padding in reversed(self.geometry.padding) for p in (padding, padding)]
        x = torch.nn.functional.pad(self.x, pads) if any(pads) else self.x
        sizes, out = x.shape[2:], self.g.shape[2:]
        x = x.reshape(samples * groups, -1, math.prod(sizes))
        g = self.g.reshape(samples * groups, -1, math.prod(out))
        over_x = torch.bmm(x.mT, x).view(-1, *sizes, *sizes)
        over_g = torch.bmm(g.mT, g)
        box = self._box(over_x, out)
        return (over_g * box.view_as(over_g)).sum((1, 2)).view(samples, groups).sum(1).clamp_(min=0)

    def _box(self, gram: torch.Tensor, out: torch.Size) -> torch.Tensor:
        # [samples * groups, *in, *in] to [samples * groups, *out, *out], added up over the offsets of the kernel
        total: Any = None
        for offset in itertools.product(*(range(k) for k in self.shape[2:])):
            steps = zip(offset, out, self.geometry.stride, self.geometry.dilation, strict=True)
            window = tuple(slice(k * d, k * d + s * (o - 1) + 1, s) for k, o, s, d in steps)
            part = gram[(slice(None), *window, *window)]
            total = part.clone() if total is None else total.add_(part)
        return total

    def _norms_one_by_one(self) -> torch.Tensor:
        norms = [
            torch.linalg.vector_norm(weight_gradient(x[None], g[None], self.shape, self.geometry))
            for x, g in zip(self.x, self.g, strict=True)
        ]
        return torch.stack(norms).square()

    def _gram_cost(self) -> int:
        out, padded = math.prod(self.g.shape[2:]), 1
        for size, padding in zip(self.x.shape[2:], self.geometry.padding, strict=True):
            padded *= size + 2 * padding
        products = padded**2 * self.x.shape[1] + out**2 * self.g.shape[1]
        moves = self.geometry.groups * (padded**2 + out**2 * (2 + math.prod(self.shape[2:])))
        return products + moves * WINDOW_COST

    def _product_cost(self) -> int:
        return (math.prod(self.g.shape[2:]) + 2 * BYTE_COST) * self.shape.numel() + CALL_COST

    def _keep_cost(self) -> int:
        # A grouped convolution works on one sample's few positions at a time: slower by as much as they are few.
        small = max(0, 8 * BYTE_COST - math.prod(self.g.shape[2:]))
        return (3 * BYTE_COST + small) * self.shape.numel()

    def worth_keeping(self) -> bool:
        """Whether keeping the per-sample gradients is cheaper than this form, and takes no memory to speak of.

        Returns:
            Whether it is.
        """
        size = self.shape.numel()
        factors = self.x[0].numel() + self.g[0].numel()
        cheaper = self._keep_cost() < min(self._gram_cost(), self._product_cost())
        return size <= factors // 4 or (cheaper and size <= KEEP_RATIO * factors)

    def per_sample(self) -> torch.Tensor:
        """All samples in one grouped convolution gradient.

        Returns:
            Shape ``[samples, *weight]``.
        """
        samples, geometry = len(self.x), self.geometry
        grouped = Geometry(geometry.stride, geometry.padding, geometry.dilation, samples * geometry.groups)
        x = self.x.reshape(1, -1, *self.x.shape[2:])
        g = self.g.reshape(1, -1, *self.g.shape[2:])
        shape = torch.Size((samples * self.shape[0], *self.shape[1:]))
        return weight_gradient(x, g, shape, grouped).view(samples, *self.shape)

    def weighted_sum(self, factors: torch.Tensor) -> torch.Tensor:
        """One ordinary weight gradient, with the factors on the smaller operand.

        Args:
            factors: shape ``[samples]``.

        Returns:
            Shape of the weight.
        """
        x, g = self.x, self.g
        scale = factors.to(x.dtype).view(-1, *[1] * (x.dim() - 1))
        if x.numel() < g.numel():
            x = x * scale
        else:
            g = g * scale
        return weight_gradient(x, g, self.shape, self.geometry)


def weight_gradient(x: torch.Tensor, g: torch.Tensor, shape: torch.Size, geometry: Geometry) -> torch.Tensor:
    """PyTorch's own gradient of a convolution's weight.

    Args:
        x: shape ``[batch, channels, *in]``.
        g: shape ``[batch, filters, *out]``.
        shape: shape of the weight.
        geometry: stride, padding, dilation, groups.

    Returns:
        Shape of the weight.
    """
    weight = x.new_empty(1).expand(shape)  # only its shape matters for its gradient
    spatial = len(shape) - 2
    return torch.ops.aten.convolution_backward(
        g, x, weight, None, geometry.stride, geometry.padding, geometry.dilation, False, [0] * spatial,
        geometry.groups, [False, True, False],
    )[1]  # fmt: skip


def correlation(x: torch.Tensor, g: torch.Tensor, shape: torch.Size, geometry: Geometry, rows: int) -> Contribution:
    """The cheapest form of a convolution's per-sample weight gradients.

    Args:
        x: shape ``[samples * rows, channels, *in]``.
        g: shape ``[samples * rows, filters, *out]``.
        shape: shape of the weight.
        geometry: stride, padding, dilation, groups.
        rows: rows per sample.

    Returns:
        The contribution.
    """
    if math.prod(shape[2:]) == 1 and geometry.groups == 1 and not any(geometry.padding):
        window = tuple(slice(None, None, s) for s in geometry.stride)
        x = x[(slice(None), slice(None), *window)]
        x = x[(slice(None), slice(None), *(slice(o) for o in g.shape[2:]))]
        return outer(_positions_last(x, rows).mT, _positions_last(g, rows).mT, shape)
    whole = Correlation(x, g, shape, geometry)
    if rows > 1:
        return Kept(whole.per_sample().unflatten(0, (-1, rows)).sum(1))
    return Kept(whole.per_sample()) if whole.worth_keeping() else whole


def _positions_last(t: torch.Tensor, rows: int) -> torch.Tensor:
    # [samples * rows, channels, *positions] to [samples, channels, rows * positions]
    return t.flatten(2) if rows == 1 else t.flatten(2).unflatten(0, (-1, rows)).transpose(1, 2).flatten(2)

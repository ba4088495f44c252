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
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from typing_extensions import override

from dpfix.engines.bookkeeping.autotune import Autotune, rounded
from dpfix.engines.bookkeeping.contributions import (
    Contribution,
    Kept,
    Measured,
    at_once,
    chosen,
    full_precision,
    sizes,
    squared,
    zeroed,
)
from dpfix.engines.bookkeeping.linear import BYTE_COST, CALL_COST, of_terms, outer

KEEP_RATIO = 2.0
"""Kept gradients may be this many times larger than the layer's input and output gradient, which they replace."""
WINDOW_COST = 40
"""Multiply-adds that cost as much time as one element of a strided window of a Gram matrix."""
WORTH_TRYING = 2.5
"""Ways whose cost is estimated at up to this many times the smallest estimate are tried."""
TRIED_SAMPLES = 8
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


class Correlation(Contribution):
    """The gradient of a convolution's weight by its factors.

    Args:
        x: shape ``[samples * rows, channels, *in]``.
        g: shape ``[samples * rows, filters, *out]``.
        shape: shape of the weight, ``[filters, channels / groups, *kernel]``.
        geometry: stride, padding, dilation, groups.
        rows: rows per sample, next to each other; their gradients are never had one by one.
        autotune: remembers the fastest way.
    """

    def __init__(
        self,
        x: torch.Tensor,
        g: torch.Tensor,
        shape: torch.Size,
        geometry: Geometry,
        rows: int = 1,
        autotune: Autotune | None = None,
    ) -> None:
        self.x, self.g, self.shape, self.geometry = full_precision(x), full_precision(g), shape, geometry
        self.rows, self.samples = rows, len(x) // rows
        self._autotune = Autotune() if autotune is None else autotune

    @property
    @override
    def kind(self) -> Hashable:
        return Correlation, self.shape, self.geometry, self.x.shape[1:], self.g.shape[1:]

    @override
    def joined(self, others: Sequence[Correlation]) -> Contribution:
        """One call with all their rows."""
        every = [self, *others]
        x, g = (
            torch.cat(parts, 1).flatten(0, 1)
            for parts in zip(*((c._by_sample(c.x), c._by_sample(c.g)) for c in every), strict=True)
        )
        rows = sum(c.rows for c in every)
        return Correlation(x, g, self.shape, self.geometry, rows, self._autotune).chosen()

    # ---------------------------------------------------------------- norms

    @override
    def squared_norms(self) -> torch.Tensor:
        return self._measured.squared

    @override
    def measured(self) -> Measured:
        """In the way that was found to be fastest; kept, since some take as long as the gradients."""
        return self._measured

    @override
    def picked(self, samples: torch.Tensor, double: bool) -> Correlation:
        x, g = (chosen(self._by_sample(t), samples, double).flatten(0, 1) for t in (self.x, self.g))
        form = Correlation(x, g, self.shape, self.geometry, self.rows, self._autotune)
        form.way = "norms_by_sample"
        return form

    @cached_property
    def _measured(self) -> Measured:
        if self.way == "norms_by_gram":
            products = self._gram()
            terms = of_terms(products).view(self.samples, -1)
            return Measured(self._over_gram(products), torch.linalg.vector_norm(terms, dim=1), gram=True)
        norms = self.norms_by_patches() if self.way == "norms_by_patches" else self.norms_by_sample()
        factors = sizes(self._by_sample(self.x), self._by_sample(self.g))
        return Measured(norms, factors * math.sqrt(math.prod(self.shape[2:])))

    def norms_by_gram(self) -> torch.Tensor:
        """From products of every position with every other, for samples of one row.

        Returns:
            Shape ``[samples]``.
        """
        return self._over_gram(self._gram())

    def _over_gram(self, products: torch.Tensor) -> torch.Tensor:
        return self._over_groups(products.sum((1, 2))).clamp_(min=0)

    def _gram(self) -> torch.Tensor:
        """``G[t, t'] sum_k X[s t + d k, s t' + d k]`` with the Gram matrices G and X over the channels of a group.

        Returns:
            Shape ``[samples * groups, positions, positions]``.
        """
        x, g = (self._by_group(t).squeeze(1) for t in (self._padded(self.x), self.g))
        inside, out = x.shape[2:], g.shape[2:]
        x, g = x.flatten(2), g.flatten(2)
        over_x = torch.bmm(x.mT, x).view(-1, *inside, *inside)
        over_g = torch.bmm(g.mT, g)
        return over_g.mul_(self._box(over_x, out).view_as(over_g))

    def _box(self, gram: torch.Tensor, out: torch.Size) -> torch.Tensor:
        # [samples * groups, *in, *in] to [samples * groups, *out, *out], added up over the offsets of the kernel
        total: Any = None
        for offset in itertools.product(*(range(k) for k in self.shape[2:])):
            steps = zip(offset, out, self.geometry.stride, self.geometry.dilation, strict=True)
            window = tuple(slice(k * d, k * d + s * (o - 1) + 1, s) for k, o, s, d in steps)
            part = gram[(slice(None), *window, *window)]
            total = part.clone() if total is None else total.add_(part)
        return total

    def norms_by_sample(self) -> torch.Tensor:
        """One ordinary weight gradient per sample.

        Returns:
            Shape ``[samples]``.
        """
        norms = [
            torch.linalg.vector_norm(weight_gradient(x, g, self.shape, self.geometry))
            for x, g in zip(self.x.split(self.rows), self.g.split(self.rows), strict=True)
        ]
        return torch.stack(norms).square()

    def norms_by_patches(self) -> torch.Tensor:
        """As many samples at a time as fit into a buffer.

        Returns:
            Shape ``[samples]``.
        """
        return self._over_groups(torch.cat([squared(part.flatten(1)) for part in self._products()]))

    def _products(self) -> Iterator[torch.Tensor]:
        """Per-sample gradients of some samples (and groups) at a time, shape ``[some, filters, kernel * channels]``."""
        kernel, out = self.shape[2:], self.g.shape[2:]
        x, g = self._by_group(self._padded(self.x)), self._by_group(self.g)
        positions = self.rows * math.prod(out)
        numbers = positions * self.shape[1:].numel() + self.shape.numel() // self.geometry.groups
        step = max(1, at_once(x.device) // numbers)
        for front, back in zip(x.split(step), g.split(step), strict=True):
            some = front.movedim(2, -1).contiguous()
            *firsts, last = some.stride()
            first, moves = firsts[:2], firsts[2:]
            windows = [m * s for m, s in zip(moves, self.geometry.stride, strict=True)]
            inside = [m * d for m, d in zip(moves, self.geometry.dilation, strict=True)]
            size = (*some.shape[:2], *out, *kernel, some.shape[-1])
            patches = some.as_strided(size, (*first, *windows, *inside, last))
            filters = back.transpose(1, 2).reshape(len(some), -1, positions)
            yield torch.bmm(filters, patches.reshape(len(some), positions, -1))

    def _padded(self, x: torch.Tensor) -> torch.Tensor:
        pads = [p for padding in reversed(self.geometry.padding) for p in (padding, padding)]
        return torch.nn.functional.pad(x, pads) if any(pads) else x

    def _by_sample(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.unflatten(0, (self.samples, self.rows))

    def _by_group(self, tensor: torch.Tensor) -> torch.Tensor:
        """From ``[samples * rows, channels, ...]`` to ``[samples * groups, rows, channels / groups, ...]``."""
        split = tensor.reshape(self.samples, self.rows, self.geometry.groups, -1, *tensor.shape[2:])
        return split.transpose(1, 2).flatten(0, 1)

    def _over_groups(self, norms: torch.Tensor) -> torch.Tensor:
        return norms.view(self.samples, self.geometry.groups).sum(1)

    # ---------------------------------------------------------------- the choice

    @cached_property
    def way(self) -> str:
        """The fastest way on this machine; estimated first, and tried on a few samples where that leaves a doubt."""
        costs = self._costs()
        likely = sorted(name for name, cost in costs.items() if cost <= WORTH_TRYING * min(costs.values()))
        tried = TRIED_SAMPLES * self.rows
        few = Correlation(self.x[:tried], self.g[:tried], self.shape, self.geometry, self.rows)
        factors = few.x.new_ones(few.samples)

        def whole_step(name: str) -> Callable[[], object]:
            if name.startswith("keep"):
                return lambda: squared(getattr(few, name)().flatten(1))
            return lambda: (getattr(few, name)(), few.weighted_sum(factors))

        shapes = (*rounded(self.x.shape[1:]), *rounded(self.g.shape[1:]), *self.shape[2:])
        key = (shapes, self.geometry, self.rows)  # without the precision: the audit may look again in double
        return self._autotune.fastest(key, {name: whole_step(name) for name in likely}, self.x.device)

    def _costs(self) -> dict[str, float]:
        """Multiply-adds per sample that take as long as each way, roughly."""
        size, groups = self.shape.numel(), self.geometry.groups
        out, padded = math.prod(self.g.shape[2:]) * self.rows, 1
        for length, padding in zip(self.x.shape[2:], self.geometry.padding, strict=True):
            padded *= length + 2 * padding
        patches = out * math.prod(self.shape[2:]) * self.x.shape[1]
        moved = patches * (1 if patches <= at_once(self.x.device) else UNCACHED) + size
        moves = groups * (padded**2 + out**2 * (2 + math.prod(self.shape[2:])))
        again = out * size  # the weight gradient of the batch
        costs: dict[str, float] = {
            "norms_by_sample": (out + 2 * BYTE_COST) * size + CALL_COST + again,
            "norms_by_patches": out * size + moved * BYTE_COST + again,
        }
        if self.rows == 1:
            gram = padded**2 * self.x.shape[1] + out**2 * self.g.shape[1]
            costs["norms_by_gram"] = gram + moves * WINDOW_COST + again
        if size <= KEEP_RATIO * self.rows * (self.x[0].numel() + self.g[0].numel()):
            # A grouped convolution works on one sample's few positions at a time: slower by as much as they are few.
            costs["keep_by_groups"] = (max(out, 8 * BYTE_COST) + 3 * BYTE_COST) * size
            costs["keep_by_patches"] = out * size + (moved + size) * BYTE_COST
        return costs

    def chosen(self) -> Contribution:
        """The gradients themselves, or the factors they are made of.

        Returns:
            Whichever costs less, among what takes no more memory than the factors.
        """
        return Kept(getattr(self, self.way)()) if self.way.startswith("keep") else self

    def keep_by_patches(self) -> torch.Tensor:
        """Per-sample gradients from products of some samples at a time.

        Returns:
            Shape ``[samples, *weight]``.
        """
        samples, kernel = self.samples, self.shape[2:]
        found = self.g.new_empty(
            samples * self.geometry.groups, self.shape[0] // self.geometry.groups, self.shape[1:].numel()
        )
        place = 0
        for part in self._products():
            # the patches have their channels last
            into = found[place : place + len(part)].view(*part.shape[:2], self.shape[1], -1)
            into.copy_(part.view(*part.shape[:2], -1, self.shape[1]).mT)
            place += len(part)
        return found.view(samples, self.shape[0], self.shape[1], *kernel)

    @override
    def per_sample(self) -> torch.Tensor:
        return self.keep_by_groups()

    def keep_by_groups(self) -> torch.Tensor:
        """All samples in one grouped convolution gradient, whose batch are the rows.

        Returns:
            Shape ``[samples, *weight]``.
        """
        samples, geometry = self.samples, self.geometry
        grouped = Geometry(geometry.stride, geometry.padding, geometry.dilation, samples * geometry.groups)
        x, g = (self._by_sample(t).transpose(0, 1).flatten(1, 2) for t in (self.x, self.g))
        shape = torch.Size((samples * self.shape[0], *self.shape[1:]))
        return weight_gradient(x, g, shape, grouped).view(samples, *self.shape)

    @override
    def weighted_sum(self, factors: torch.Tensor) -> torch.Tensor:
        """One ordinary weight gradient, with the factors on the smaller operand."""
        x, g = self.x, self.g
        factors = factors.to(x.dtype)
        by_row = factors if self.rows == 1 else factors.repeat_interleave(self.rows)
        scale = by_row.view(-1, *[1] * (x.dim() - 1))
        if x.numel() < g.numel():
            x = x * scale
        else:
            g = g * scale
        return weight_gradient(x, g, self.shape, self.geometry)

    @override
    def without(self, samples: torch.Tensor) -> Correlation:
        by_row = samples.repeat_interleave(self.rows)
        x, g = zeroed(self.x, by_row), zeroed(self.g, by_row)
        return Correlation(x, g, self.shape, self.geometry, self.rows, self._autotune)


def weight_gradient(x: torch.Tensor, g: torch.Tensor, shape: torch.Size, geometry: Geometry) -> torch.Tensor:
    """PyTorch's own gradient of a convolution's weight.

    Args:
        x: shape ``[batch, channels, *in]``.
        g: shape ``[batch, filters, *out]``.
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


def correlation(
    x: torch.Tensor, g: torch.Tensor, shape: torch.Size, geometry: Geometry, rows: int, autotune: Autotune
) -> Contribution:
    """The cheapest form of a convolution's per-sample weight gradients.

    Args:
        x: shape ``[samples * rows, channels, *in]``.
        g: shape ``[samples * rows, filters, *out]``.
        geometry: stride, padding, dilation, groups.
        autotune: remembers the fastest way.

    Returns:
        The contribution.
    """
    if math.prod(shape[2:]) == 1 and geometry.groups == 1 and not any(geometry.padding):
        window = tuple(slice(None, None, s) for s in geometry.stride)
        x = x[(slice(None), slice(None), *window)]
        x = x[(slice(None), slice(None), *(slice(o) for o in g.shape[2:]))]
        return outer(_positions_last(x, rows).mT, _positions_last(g, rows).mT, shape)
    return Correlation(x, g, shape, geometry, rows, autotune).chosen()


def _positions_last(t: torch.Tensor, rows: int) -> torch.Tensor:
    # [samples * rows, channels, *positions] to [samples, channels, rows * positions]
    return t.flatten(2) if rows == 1 else t.flatten(2).unflatten(0, (-1, rows)).transpose(1, 2).flatten(2)

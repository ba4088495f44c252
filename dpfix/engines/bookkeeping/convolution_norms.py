"""Per-sample gradients of convolution weights.

The gradient of a weight ``W[o, c, k]`` correlates what went in with what came back, sample by sample:
``sum_t g[o, t] x[c, stride t + dilation k]``. All samples at once are one grouped convolution gradient with
``samples * groups`` groups (Rochette et al., "Efficient Per-Example Gradient Computations in Convolutional Neural
Networks", 2019); for small outputs its norm is had from Gram matrices (Bu et al., "Scalable and Efficient Training of
Large Convolutional Neural Networks with Differential Privacy", 2022), here without unfolding: the Gram matrix of the
input is summed over the kernel's offsets.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from functools import cached_property, partial

import torch
from typing_extensions import override

from dpfix.engines.bookkeeping.autotune import Autotune, rounded
from dpfix.engines.bookkeeping.blocks import at_once, in_a_row, near, parted
from dpfix.engines.bookkeeping.contributions import (
    Contribution,
    Kept,
    Measured,
    chosen,
    full_precision,
    sizes,
    zeroed,
)
from dpfix.engines.bookkeeping.convolution_costs import Geometry, worth_trying
from dpfix.engines.bookkeeping.depthwise import by_lines
from dpfix.engines.bookkeeping.linear import of_terms, outer

TRIED_SAMPLES = 8


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
            terms = of_terms(products)
            if self.geometry.groups > 1:
                terms = torch.linalg.vector_norm(terms.view(self.samples, -1), dim=1)
            return Measured(self._over_gram(products), terms, gram=True)
        norms = getattr(self, self.way if self.way.startswith("norms") else "norms_by_sample")()
        factors = sizes(*((self.x, self.g) if self.rows == 1 else map(self._by_sample, (self.x, self.g))))
        return Measured(norms, factors.mul_(math.sqrt(math.prod(self.shape[2:]))))

    def norms_by_gram(self) -> torch.Tensor:
        """From products of every position with every other, those of other rows of the sample among them.

        Returns:
            Shape ``[samples]``.
        """
        return self._over_gram(self._gram())

    def _over_gram(self, products: torch.Tensor) -> torch.Tensor:
        return self._over_groups(products.sum((1, 2))).clamp_(min=0)

    def _gram(self) -> torch.Tensor:
        """``G[t, t'] sum_k X[s t + d k, s t' + d k]`` with the Gram matrices G and X over the channels of a group.

        A position is one of a row; a sample's rows have no offset to each other.

        Returns:
            Shape ``[samples * groups, rows * positions, rows * positions]``.
        """
        padded = self._padded(self.x)
        x, g = (self._by_channel(t) for t in (padded, self.g))
        over_x, over_g = torch.bmm(x.mT, x), torch.bmm(g.mT, g)
        return over_g.mul_(self._box(over_x, padded.shape[2:], self.g.shape[2:]).view_as(over_g))

    def _by_channel(self, tensor: torch.Tensor) -> torch.Tensor:
        """From ``[samples * rows, channels, ...]`` to ``[samples * groups, channels / groups, rows * positions]``."""
        groups = self.geometry.groups
        channels = tensor.shape[1] // groups
        if self.rows > 1:
            tensor = tensor.reshape(self.samples, self.rows, groups, channels, -1).movedim(1, 3)
        return tensor.reshape(self.samples * groups, channels, -1)

    def _box(self, gram: torch.Tensor, inside: Sequence[int], out: Sequence[int]) -> torch.Tensor:
        # [samples * groups, *in, *in] to [samples * groups, *out, *out], added up over the offsets of the kernel: the sum
        # over offsets in all dimensions is that over the offsets in one of them, of that over those in the others; the
        # rows are a dimension without any
        present, out, both = [self.rows, *inside], [self.rows, *out], 1 + len(inside)
        offsets = zip(self.shape[2:], self.geometry.stride, self.geometry.dilation, strict=True)
        for dim, (kernel, stride, dilation) in enumerate(offsets, 1):
            if kernel == stride == 1:
                continue
            size = [len(gram), *present, *present]
            steps = [math.prod(size[i + 1 :]) for i in range(len(size))]
            shift = dilation * (steps[1 + dim] + steps[1 + dim + both])
            present[dim] = out[dim]
            for place in (1 + dim, 1 + dim + both):
                steps[place] *= stride
            size = [len(gram), *present, *present]
            parts = [gram.as_strided(size, steps, gram.storage_offset() + k * shift) for k in range(kernel)]
            gram = parts[0].clone(memory_format=torch.contiguous_format)
            for part in parts[1:]:
                gram.add_(part)
        return gram

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

    def norms_by_groups(self) -> torch.Tensor:
        """Grouped convolution gradients of some samples at a time.

        Returns:
            Shape ``[samples]``.
        """
        some = at_once(self.x.device, self.shape.numel(), self.samples) * self.rows
        norms = []
        for x, g in zip(parted(self.x, some), parted(self.g, some), strict=True):
            form = Correlation(x, g, self.shape, self.geometry, self.rows, self._autotune)
            norms.append(torch.linalg.vector_norm(form._by_groups(), dim=(1, 2)))
        return in_a_row(norms).square_()

    def norms_by_patches(self) -> torch.Tensor:
        """As many samples at a time as fit into a buffer.

        Returns:
            Shape ``[samples]``.
        """
        norms = [torch.linalg.vector_norm(part, dim=(1, 2)) for part in self._products()]
        return self._over_groups(in_a_row(norms).square_())

    def _products(self) -> Iterator[torch.Tensor]:
        """Per-sample gradients of some samples (and groups) at a time, shape ``[some, filters, kernel * channels]``."""
        kernel, out = self.shape[2:], self.g.shape[2:]
        positions = self.rows * math.prod(out)
        x, g = self._by_group(self._padded(self.x)), self._by_group(self.g)
        g = (g.transpose(1, 2) if self.rows > 1 else g).reshape(len(g), -1, positions)
        for front, filters in zip(parted(x, self._step), parted(g, self._step), strict=True):
            some = front.movedim(2, -1).contiguous()
            *firsts, last = some.stride()
            first, moves = firsts[:2], firsts[2:]
            windows = [m * s for m, s in zip(moves, self.geometry.stride, strict=True)]
            inside = [m * d for m, d in zip(moves, self.geometry.dilation, strict=True)]
            size = (*some.shape[:2], *out, *kernel, some.shape[-1])
            patches = some.as_strided(size, (*first, *windows, *inside, last))
            yield torch.bmm(filters, patches.reshape(len(some), positions, -1))

    @property
    def _step(self) -> int:
        """Samples, or groups of them, whose patches and gradients are computed at a time."""
        numbers = self.rows * self.g.shape[2:].numel() * self.shape[1:].numel()
        numbers += self.shape.numel() // self.geometry.groups
        return at_once(self.x.device, numbers, self.samples * self.geometry.groups)

    def _padded(self, x: torch.Tensor) -> torch.Tensor:
        pads = [p for padding in reversed(self.geometry.padding) for p in (padding, padding)]
        return torch.nn.functional.pad(x, pads) if any(pads) else x

    def _by_sample(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.unflatten(0, (self.samples, self.rows))

    def _by_group(self, tensor: torch.Tensor) -> torch.Tensor:
        """From ``[samples * rows, channels, ...]`` to ``[samples * groups, rows, channels / groups, ...]``."""
        groups = self.geometry.groups
        if self.rows == 1:
            return tensor.reshape(self.samples * groups, 1, tensor.shape[1] // groups, *tensor.shape[2:])
        split = tensor.reshape(self.samples, self.rows, groups, -1, *tensor.shape[2:])
        return split.transpose(1, 2).flatten(0, 1)

    def _over_groups(self, norms: torch.Tensor) -> torch.Tensor:
        return norms.view(self.samples, self.geometry.groups).sum(1) if self.geometry.groups > 1 else norms

    # ---------------------------------------------------------------- the choice

    @cached_property
    def way(self) -> str:
        """The fastest way on this machine: estimated, tried on a few samples where that leaves a doubt, then on all."""
        device, sizes = self.x.device, (self.x.shape[1:], self.g.shape[1:])
        likely = worth_trying(*sizes, self.shape, self.geometry, self.rows, near(device))

        def step(name: str, samples: int) -> None:
            rows = samples * self.rows
            some = Correlation(self.x[:rows], self.g[:rows], self.shape, self.geometry, self.rows)
            found = getattr(some, name)()
            form: Contribution = some
            if name.startswith("keep"):
                form = Kept(found)
                form.squared_norms()
            form.weighted_sum(some.x.new_ones(some.samples))

        few = min(TRIED_SAMPLES, self.samples)
        ways, whole = ({name: partial(step, name, n) for name in likely} for n in (few, self.samples))
        shapes = (*rounded(sizes[0]), *rounded(sizes[1]), *self.shape[2:])
        many = self.samples > TRIED_SAMPLES
        key = (shapes, self.geometry, self.rows, many)  # without the precision: the audit may look again in double
        return self._autotune.fastest(key, ways, device, whole if many else None)

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
        groups, channels = self.geometry.groups, self.shape[1]
        found = self.g.new_empty(samples * groups, self.shape[0] // groups, channels, math.prod(kernel))
        for into, part in zip(parted(found, self._step), self._products(), strict=True):
            into.copy_(part.view(*part.shape[:2], -1, channels).mT)  # the patches have their channels last
        return found.view(samples, *self.shape)

    @override
    def per_sample(self) -> torch.Tensor:
        return self.keep_by_groups()

    def keep_by_groups(self) -> torch.Tensor:
        """All samples in one grouped convolution gradient, whose batch are the rows.

        Returns:
            Shape ``[samples, *weight]``.
        """
        return self._by_groups().view(self.samples, *self.shape)

    def keep_by_lines(self) -> torch.Tensor:
        """Of a depthwise convolution in two dimensions: see :func:`~dpfix.engines.bookkeeping.depthwise.by_lines`.

        Returns:
            Shape ``[samples, *weight]``.
        """
        kept = by_lines(self._padded(self.x), self.g, self.shape[2:], self.geometry)
        if self.rows > 1:
            kept = kept.view(self.samples, self.rows, -1).sum(1)
        return kept.view(self.samples, *self.shape)

    def _by_groups(self) -> torch.Tensor:
        samples, geometry = self.samples, self.geometry
        grouped = Geometry(geometry.stride, geometry.padding, geometry.dilation, samples * geometry.groups)
        if self.rows == 1:
            x, g = (t.reshape(1, -1, *t.shape[2:]) for t in (self.x, self.g))
        else:
            x, g = (self._by_sample(t).transpose(0, 1).flatten(1, 2) for t in (self.x, self.g))
        shape = torch.Size((samples * self.shape[0], *self.shape[1:]))
        return weight_gradient(x, g, shape, grouped).view(samples, self.shape[0], -1)

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
    weight = x.new_empty_strided(shape, (0,) * len(shape))  # only its shape matters for its gradient
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

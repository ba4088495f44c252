"""What one layer call adds to the per-sample gradient of one parameter, in the cheapest form that is enough.

Clipping needs two things of the per-sample gradients: their norms, and one weighted sum. A contribution gives both,
and the gradients themselves only when they are asked for (a parameter that is used several times, other clippings).
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from typing_extensions import override


@dataclass(frozen=True)
class Measured:
    """Norms of per-sample gradients, and what rounding may have done to them.

    Attributes:
        squared: squared norms, shape ``[samples]``.
        terms: norms of the terms that a sample's gradient is the sum of, added up: at least so much, shape ``[samples]``;
            ``None`` where the gradients are there already and what is summed up is what was measured.
        gram: whether the squared norms are sums of products of terms.
    """

    squared: torch.Tensor
    terms: torch.Tensor | None = None
    gram: bool = False


class Contribution(ABC):
    """The per-sample gradients of one parameter from one call."""

    @property
    def kind(self) -> Hashable:
        """What those to the same parameter and samples have in common that can be joined; only itself by default."""
        return id(self)

    def joined(self, others: Sequence[Any]) -> Contribution:
        """The sum of several calls.

        Args:
            others: further contributions of the same kind.

        Returns:
            Their sum.
        """
        raise NotImplementedError

    @abstractmethod
    def squared_norms(self) -> torch.Tensor:
        """Squared norms.

        Returns:
            Shape ``[samples]``.
        """

    @abstractmethod
    def per_sample(self) -> torch.Tensor:
        """The gradients themselves.

        Returns:
            Shape ``[samples, *parameter]``.
        """

    @abstractmethod
    def weighted_sum(self, factors: torch.Tensor) -> torch.Tensor:
        """``sum_i factors_i g_i``.

        Args:
            factors: shape ``[samples]``.

        Returns:
            Shape of the parameter.
        """

    def without(self, samples: torch.Tensor) -> Contribution:
        """The same with zeros for some samples whose gradients are not finite: zero times NaN would be NaN.

        Args:
            samples: shape ``[samples]``, true where a sample is left out.

        Returns:
            A new contribution; this one may share its memory with others.
        """
        return Kept(zeroed(self.per_sample(), samples))

    def measured(self) -> Measured:
        """Squared norms with what they, and the sum, may be off by.

        Returns:
            The norms.
        """
        return Measured(self.squared_norms())

    def picked(self, samples: torch.Tensor, double: bool) -> Contribution:
        """Some samples once more, with norms that are no sums of products.

        Args:
            samples: their numbers.
            double: whether they are computed in double precision.

        Returns:
            Their contribution.
        """
        return Kept(chosen(self.per_sample(), samples, double))


class Kept(Contribution):
    """Gradients that are kept as they are.

    Args:
        gradients: shape ``[samples, *parameter]``.
    """

    def __init__(self, gradients: torch.Tensor) -> None:
        self.gradients = full_precision(gradients)

    @property
    @override
    def kind(self) -> Hashable:
        return Kept

    @override
    def joined(self, others: Sequence[Kept]) -> Kept:
        total = self.gradients.clone()
        for other in others:
            total += other.gradients
        return Kept(total)

    @override
    def squared_norms(self) -> torch.Tensor:
        return squared(flat(self.gradients))

    @override
    def per_sample(self) -> torch.Tensor:
        return self.gradients

    @override
    def weighted_sum(self, factors: torch.Tensor) -> torch.Tensor:
        total = torch.mm(factors.to(self.gradients.dtype).view(1, -1), flat(self.gradients))
        return total.view(self.gradients.shape[1:])


class Part(Contribution):
    """What goes to some rows of a parameter only, as the projections inside ``nn.MultiheadAttention`` do.

    Args:
        inner: the contribution to these rows.
        first: the first row.
        last: the row behind the last one.
        shape: shape of the whole parameter.
    """

    def __init__(self, inner: Contribution, first: int, last: int, shape: torch.Size) -> None:
        self.inner, self.first, self.last, self.shape = inner, first, last, shape

    @override
    def squared_norms(self) -> torch.Tensor:
        return self.inner.squared_norms()

    @override
    def measured(self) -> Measured:
        return self.inner.measured()

    @override
    def picked(self, samples: torch.Tensor, double: bool) -> Contribution:
        return Part(self.inner.picked(samples, double), self.first, self.last, self.shape)

    @override
    def per_sample(self) -> torch.Tensor:
        rows = self.inner.per_sample()
        whole = rows.new_zeros(len(rows), *self.shape)
        whole[:, self.first : self.last] = rows
        return whole

    @override
    def weighted_sum(self, factors: torch.Tensor) -> torch.Tensor:
        rows = self.inner.weighted_sum(factors)
        whole = rows.new_zeros(self.shape)
        whole[self.first : self.last] = rows
        return whole

    @override
    def without(self, samples: torch.Tensor) -> Part:
        return Part(self.inner.without(samples), self.first, self.last, self.shape)


class Apart(Contribution):
    """Parts of a parameter that do not overlap, so that their squared norms add up."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts

    @override
    def squared_norms(self) -> torch.Tensor:
        return torch.stack([p.squared_norms() for p in self.parts]).sum(0)

    @override
    def measured(self) -> Measured:
        every = [p.measured() for p in self.parts]
        squared, terms = torch.stack([m.squared for m in every]).sum(0), [m.terms for m in every if m.terms is not None]
        together = torch.linalg.vector_norm(torch.stack(terms), dim=0) if terms else None
        return Measured(squared, together, any(m.gram for m in every))

    @override
    def picked(self, samples: torch.Tensor, double: bool) -> Contribution:
        return Apart([Part(p.inner.picked(samples, double), p.first, p.last, p.shape) for p in self.parts])

    @override
    def per_sample(self) -> torch.Tensor:
        return torch.stack([p.per_sample() for p in self.parts]).sum(0)

    @override
    def weighted_sum(self, factors: torch.Tensor) -> torch.Tensor:
        return torch.stack([p.weighted_sum(factors) for p in self.parts]).sum(0)

    @override
    def without(self, samples: torch.Tensor) -> Apart:
        return Apart([p.without(samples) for p in self.parts])


def zeroed(tensor: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
    """A copy with zeros for some samples.

    Args:
        tensor: shape ``[samples, ...]``.
        samples: shape ``[samples]``, true where zeros are wanted.

    Returns:
        The copy.
    """
    return tensor.masked_fill(samples.to(tensor.device).view(-1, *[1] * (tensor.dim() - 1)), 0)


def chosen(tensor: torch.Tensor, samples: torch.Tensor, double: bool) -> torch.Tensor:
    """Some rows.

    Args:
        tensor: shape ``[samples, ...]``.
        samples: their numbers.
        double: whether in double precision.

    Returns:
        Shape ``[len(samples), ...]``.
    """
    rows = tensor.index_select(0, samples)
    return rows.double() if double else rows


def sizes(*factors: torch.Tensor) -> torch.Tensor:
    """At least what the terms of a sum over positions of products amount to.

    Args:
        *factors: shape ``[samples, ...]``, with positions among the others.

    Returns:
        The product of their norms, shape ``[samples]``.
    """
    norms = (torch.linalg.vector_norm(f, dim=tuple(range(1, f.dim()))) for f in factors)
    return functools.reduce(torch.mul, norms)


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """One row of numbers per sample.

    Args:
        tensor: shape ``[samples, ...]``.

    Returns:
        Shape ``[samples, numbers]``.
    """
    return tensor if tensor.dim() == 2 else tensor.reshape(len(tensor), -1)


def squared(rows: torch.Tensor) -> torch.Tensor:
    """Squared norm of every row, without a temporary of the same size.

    Args:
        rows: shape ``[samples, features]``.

    Returns:
        Shape ``[samples]``.
    """
    return torch.linalg.vector_norm(rows, dim=1).square()


def full_precision(tensor: torch.Tensor) -> torch.Tensor:
    """Half precision is good enough for activations, not for the sum over samples that is released.

    Returns:
        The same in float32, unless it already was at least that.
    """
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor

"""What one layer call adds to the per-sample gradient of one parameter, in the cheapest form that is enough.

Clipping needs two things of the per-sample gradients: their norms, and one weighted sum. A contribution gives both,
and the gradients themselves only when they are asked for (a parameter that is used several times, other clippings).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from typing_extensions import override


class Contribution(ABC):
    """The per-sample gradients of one parameter from one call."""

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


class Kept(Contribution):
    """Gradients that are kept as they are.

    Args:
        gradients: shape ``[samples, *parameter]``.
    """

    def __init__(self, gradients: torch.Tensor) -> None:
        self.gradients = full_precision(gradients)

    @override
    def squared_norms(self) -> torch.Tensor:
        return squared(self.gradients.reshape(len(self.gradients), -1))

    @override
    def per_sample(self) -> torch.Tensor:
        return self.gradients

    @override
    def weighted_sum(self, factors: torch.Tensor) -> torch.Tensor:
        flat = self.gradients.reshape(len(self.gradients), -1)
        return (factors.to(flat.dtype) @ flat).view(self.gradients.shape[1:])


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

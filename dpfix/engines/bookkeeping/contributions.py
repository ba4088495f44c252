"""What one layer call adds to the per-sample gradient of one parameter, in the cheapest form that is enough.

Clipping needs two things of the per-sample gradients: their norms, and one weighted sum. A contribution gives both,
and the gradients themselves only when they are asked for (a parameter that is used several times, other clippings).
"""

from __future__ import annotations

from typing import Protocol

import torch


class Contribution(Protocol):
    """The per-sample gradients of one parameter from one call."""

    def squared_norms(self) -> torch.Tensor:
        """Squared norms.

        Returns:
            Shape ``[samples]``.
        """
        ...

    def per_sample(self) -> torch.Tensor:
        """The gradients themselves.

        Returns:
            Shape ``[samples, *parameter]``.
        """
        ...

    def weighted_sum(self, factors: torch.Tensor) -> torch.Tensor:
        """``sum_i factors_i g_i``.

        Args:
            factors: shape ``[samples]``.

        Returns:
            Shape of the parameter.
        """
        ...


class Kept:
    """Gradients that are kept as they are.

    Args:
        gradients: shape ``[samples, *parameter]``.
    """

    def __init__(self, gradients: torch.Tensor) -> None:
        self.gradients = full_precision(gradients)

    def squared_norms(self) -> torch.Tensor:
        """See :class:`Contribution`.

        Returns:
            Shape ``[samples]``.
        """
        return squared(self.gradients.flatten(1))

    def per_sample(self) -> torch.Tensor:
        """See :class:`Contribution`.

        Returns:
            Shape ``[samples, *parameter]``.
        """
        return self.gradients

    def weighted_sum(self, factors: torch.Tensor) -> torch.Tensor:
        """One matrix-vector product.

        Args:
            factors: shape ``[samples]``.

        Returns:
            Shape of the parameter.
        """
        flat = self.gradients.reshape(len(self.gradients), -1)
        return (factors.to(flat.dtype) @ flat).view(self.gradients.shape[1:])


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

    Args:
        tensor: any floating tensor.

    Returns:
        The same in float32, unless it already was at least that.
    """
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def add_up(parts: list[Contribution]) -> Contribution:
    """Several contributions to one parameter: a norm needs their sum per sample, not the sum of their norms.

    Args:
        parts: contributions with the same samples.

    Returns:
        One contribution.
    """
    if len(parts) == 1:
        return parts[0]
    total = parts[0].per_sample().clone()
    for part in parts[1:]:
        total += part.per_sample()
    return Kept(total)

"""Kept gradients of small parameters, side by side: a model has many of them (biases, scales), each worth little time.

Norms and clipped sums of all of them are then a few operations, and not a few for each.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping

import torch
from torch import nn
from typing_extensions import override

from dpfix.engines.bookkeeping.contributions import Contribution, Kept, flat, zeroed

SMALL = 1024
"""Numbers of a parameter up to which its gradients are put beside those of others."""


class Together(Kept):
    """Gradients of several small parameters, side by side.

    Args:
        parts: those of every parameter, of one dtype and device.
    """

    def __init__(self, parts: Mapping[nn.Parameter, Kept]) -> None:
        super().__init__(torch.cat([flat(kept.gradients) for kept in parts.values()], 1))
        self._shapes = {p: kept.gradients.shape[1:] for p, kept in parts.items()}

    @override
    def without(self, samples: torch.Tensor) -> Together:
        left = copy.copy(self)
        left.gradients = zeroed(self.gradients, samples)
        return left

    def weighted_sums(self, factors: torch.Tensor) -> dict[nn.Parameter, torch.Tensor]:
        """``sum_i factors_i g_i`` of every parameter.

        Args:
            factors: shape ``[samples]``.

        Returns:
            By parameter, in its shape.
        """
        sums = self.weighted_sum(factors).split([shape.numel() for shape in self._shapes.values()])
        return {p: t if len(s) == 1 else t.view(s) for (p, s), t in zip(self._shapes.items(), sums, strict=True)}


def put_together(parts: Mapping[nn.Parameter, Contribution]) -> dict[nn.Parameter, Contribution]:
    """Contributions with those of small parameters in one, under the first of them.

    Args:
        parts: by parameter.

    Returns:
        By parameter.
    """
    small: dict[Hashable, dict[nn.Parameter, Kept]] = {}
    found = dict(parts)
    for p, part in parts.items():
        # exactly: what other kinds keep beside their gradients would be lost
        if type(part) is Kept and part.gradients.shape[1:].numel() <= SMALL:
            small.setdefault((p.dtype, part.gradients.dtype, part.gradients.device), {})[p] = part
    for alike in small.values():
        if len(alike) > 1:
            for p in alike:
                del found[p]
            found[next(iter(alike))] = Together(alike)
    return found

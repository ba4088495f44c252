"""Adaptive clipping: how the clip norm follows the noisy number of samples that it leaves unclipped."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from opacus.optimizers import AdaClipDPOptimizer, DPOptimizer

from dpfix.errors import ArgumentError
from dpfix.instrument.clipping import FLAT
from dpfix.training.clipping import clipping_class

LARGEST_STEP = 700.0
"""Of the logarithm of the clip norm: what ``exp`` can still take."""


def noise_of_sums(optimizer: DPOptimizer) -> float:
    """The noise multiplier of the clipped sums.

    Args:
        optimizer: a private optimizer.

    Returns:
        ``noise_multiplier``; with adaptive clipping more, since the count of unclipped samples takes its part (Andrew et al.,
        theorem 1).
    """
    noise = float(optimizer.noise_multiplier)
    if noise <= 0 or not isinstance(optimizer, AdaClipDPOptimizer):
        return noise
    return (noise**-2 - (2 * optimizer.unclipped_num_std) ** -2) ** -0.5


@functools.cache
def adaptive_class(cls: type[Any]) -> type[Any]:
    """The subclass of Opacus's ``AdaClipDPOptimizer`` whose clip norm depends on noisy sums alone, with empty draws too.

    Andrew et al. 2021, "Differentially Private Learning with Adaptive Clipping", https://arxiv.org/abs/1905.03871, release
    ``sum_i (b_i - 1/2) + noise``, where ``b_i`` is 1 for a sample that is not clipped and 0 otherwise, and divide by a
    public number. Opacus divides by the number of samples drawn, which is neither noisy nor, for an empty draw, a divisor.
    The expected batch size takes its place:

        fraction = 1/2 + (unclipped + noise - drawn / 2) / expected batch size

    Args:
        cls: ``AdaClipDPOptimizer`` or a subclass of it.

    Returns:
        A subclass for a private optimizer, which has a ``guard``.
    """

    class Adaptive(clipping_class(cls)):
        def zero_grad(self, set_to_none: bool = True) -> None:
            counted = self.sample_size, self.unclipped_num
            super().zero_grad(set_to_none)
            if self.guard.guarded.progress.partial:  # Opacus forgets them in the middle of a logical batch
                self.sample_size, self.unclipped_num = counted

        def pre_step(self, closure: Callable[[], float] | None = None) -> Any:
            if self.noise_multiplier >= 2 * self.unclipped_num_std:
                raise ArgumentError(
                    f"noise_multiplier={self.noise_multiplier:g} with unclipped_num_std={self.unclipped_num_std:g}:",
                    "the count of unclipped samples would need more than all of the noise. No parameter has moved.",
                    "Keep noise_multiplier, which a scheduler may have raised, below 2 * unclipped_num_std.",
                    path="unclipped_num_std",
                )
            if not self.guard.guarded.progress.partial:  # model.zero_grad() leaves those of the step before
                self.sample_size, self.unclipped_num = 0, torch.zeros((), device=self.params[0].device)
            return super().pre_step(closure)

        def count(self, norms: torch.Tensor | None) -> None:
            if norms is not None:  # what Opacus counts of those that are not left out
                found = norms[torch.isfinite(norms).all(1), 0]
                self.sample_size += len(found)
                self.unclipped_num += len(found) - (FLAT.factors(found, self.max_grad_norm) < 1).sum()

        def update_max_grad_norm(self) -> None:
            surplus = (float(self.unclipped_num) - self.sample_size / 2) / self.expected_batch_size
            step = -self.clipbound_learning_rate * (0.5 + surplus - self.target_unclipped_quantile)
            norm = float(self.max_grad_norm) * math.exp(min(step, LARGEST_STEP))
            self.max_grad_norm = min(max(norm, self.min_clipbound), self.max_clipbound)

    return Adaptive

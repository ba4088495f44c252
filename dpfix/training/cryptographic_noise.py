"""Noise in secure mode."""

from __future__ import annotations

from typing import Any

import torch
from opacus.optimizers import AdaClipDPOptimizer

from dpfix.sampling.cryptographic import Cryptographic
from dpfix.training.adaptive_clipping import noise_of_sums


def add_cryptographic_noise(optimizer: Any, source: Cryptographic) -> None:
    """What ``add_noise`` of Opacus's optimizers for one process does, with cryptographic numbers, in the memory of the sum.

    The noise is added in double precision, and the result is rounded once to the precision of the parameter: what is
    released has no pattern in its last bits that the noise alone would have had.

    Args:
        optimizer: a private optimizer, whose parameters have ``summed_grad``.
        source: the numbers.
    """
    std = noise_of_sums(optimizer) * float(optimizer.max_grad_norm)
    for p in optimizer.params:
        total: torch.Tensor = p.summed_grad
        if std > 0:
            source.add_normal(total, std)
        p.grad, p.summed_grad = total.view_as(p), None
    if isinstance(optimizer, AdaClipDPOptimizer):
        count = torch.tensor(float(optimizer.unclipped_num), dtype=torch.float64)
        source.add_normal(count, optimizer.unclipped_num_std)
        optimizer.unclipped_num = count

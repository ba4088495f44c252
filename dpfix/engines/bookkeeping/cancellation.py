"""Samples whose gradient is a small sum of large terms: their norms, and where needed their part of the sum, once more.

A sample's gradient of a weight is a sum of terms, one per position. Terms that nearly cancel (tokens with a large common
offset, output gradients that add up to zero) take the digits of the sum with them: the sum is uncertain by the size of
its terms times the unit of rounding, and a squared norm from Gram matrices by the square of that size. What the terms
amount to comes with the norms. Where it says that a norm, or a sample's part of the sum in clip norms, may be off by
more than :data:`TOLERANCE`, that sample alone is computed again: directly, and in double precision where the sum itself
is uncertain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from typing_extensions import override

from dpfix.engines.bookkeeping.contributions import Contribution, Measured
from dpfix.instrument.clipping import FLAT, Scheme

TOLERANCE = 1e-3
"""Relative error of a squared norm, and of a sample's part of the sum in clip norms."""

Parts = dict[nn.Parameter, Contribution]


def certain(
    parts: Parts, max_grad_norm: float, scale: float | torch.Tensor, scheme: Scheme = FLAT
) -> tuple[Parts, torch.Tensor]:
    """Contributions and squared norms without those that rounding has made worthless.

    An ordinary step pays a few numbers per sample, and one look at all of them.

    Args:
        parts: contributions by parameter.
        max_grad_norm: the clip norm.
        scale: what gradients are multiplied with before they are clipped: one number, or one per sample.
        scheme: how they are clipped.

    Returns:
        The contributions to sum up, and the squared norms over all parameters, shape ``[samples]``.
    """
    measured = {p: part.measured() for p, part in parts.items()}
    squared = [m.squared.to(max(p.dtype, torch.float32, key=_digits)) for p, m in measured.items()]
    total = _total(squared)
    scale = scale.to(total) if isinstance(scale, torch.Tensor) else scale
    summed = sorted((p for p, m in measured.items() if m.terms is not None), key=lambda p: not measured[p].gram)
    if not summed:
        return parts, total
    again, unsure = _doubts(
        [measured[p] for p in summed],
        total,
        lambda norms: scheme.factors(norms * scale, max_grad_norm) * scale,
        max_grad_norm,
    )
    if not bool(again.any()):
        return parts, total
    found = dict(parts)
    for p, rows, sums in zip(summed, again, unsure.any(1).tolist(), strict=True):
        samples = rows.nonzero().flatten().to(p.device)
        if len(samples):
            found[p] = Again(parts[p], measured[p].squared, samples, sums)
    every = [m.squared if found[p] is parts[p] else found[p].squared_norms() for p, m in measured.items()]
    return found, _total(every)


def _digits(dtype: torch.dtype) -> float:
    # torch.promote_types would be a dispatched operation for every parameter
    return -torch.finfo(dtype).eps


def _total(squared: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([s.to(squared[0].device) for s in squared]).sum(0)


def _doubts(
    measured: Sequence[Measured],
    total: torch.Tensor,
    factors_of: Callable[[torch.Tensor], torch.Tensor],
    max_grad_norm: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What has to be computed again.

    Args:
        measured: those with products of terms come first.
        total: squared norms over all parameters.
        factors_of: what gradients of some norms are multiplied with.
        max_grad_norm: the clip norm.

    Returns:
        Whether a sample of a contribution has to be computed again, and whether because of the sum, both of shape
        ``[contributions, samples]``.
    """
    terms = torch.stack([m.terms.to(total) for m in measured if m.terms is not None])
    blur = terms * max(torch.finfo(m.squared.dtype).eps for m in measured)  # of a sample's gradient
    products = sum(m.gram for m in measured)
    error = blur[:products] * terms[:products]  # of its squared norm
    lost = error.sum(0)
    least = (total - lost).clamp_(min=0)
    factors = factors_of(least.sqrt())
    # Written so that what is not a number, or too large for one, is in doubt.
    unsure = (blur * factors <= TOLERANCE * max_grad_norm).logical_not_()
    again = unsure.clone()
    again[:products] |= ~(lost <= TOLERANCE * total) & ~(error <= TOLERANCE / max(1, products) * least)
    return again, unsure


class Again(Contribution):
    """A contribution some of whose samples are computed again.

    Args:
        part: the contribution.
        squared: its squared norms as they were.
        samples: which samples are computed again.
        sums: whether their part of the sum is, too; both are in double precision then.
    """

    def __init__(self, part: Contribution, squared: torch.Tensor, samples: torch.Tensor, sums: bool) -> None:
        self.part, self.squared, self.samples, self.sums = part, squared, samples, sums

    @override
    def squared_norms(self) -> torch.Tensor:
        again = self.part.picked(self.samples, self.sums).squared_norms()
        return self.squared.to(again.dtype).index_copy(0, self.samples, again)

    @override
    def per_sample(self) -> torch.Tensor:
        return self.part.per_sample()

    @override
    def without(self, samples: torch.Tensor) -> Contribution:
        part = self.part.without(samples)
        left = self.samples[~samples.to(self.samples.device)[self.samples]]
        return Again(part, self.squared, left, self.sums) if len(left) else part

    @override
    def weighted_sum(self, factors: torch.Tensor) -> torch.Tensor:
        if not self.sums:
            return self.part.weighted_sum(factors)
        rest = self.part.weighted_sum(factors.index_fill(0, self.samples, 0))
        return rest + self.part.picked(self.samples, True).weighted_sum(factors[self.samples]).to(rest.dtype)

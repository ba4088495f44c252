"""What every engine is compared with: gradients of batches of one, independent of all engines.

The plain model, the user's training step, one sample at a time, ordinary autograd (:mod:`dpfix.observe.one_step`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from dpfix.errors import CoupledModelError
from dpfix.instrument.clipping import FLAT, Scheme
from dpfix.instrument.fixed_randomness import DRAWS, Draw
from dpfix.instrument.gradients import Gradients, weighted_sum
from dpfix.observe.probe import Probe
from dpfix.observe.record import Run, StepRecord
from dpfix.observe.training_step import Subject

_EPS = 1e-6  # Opacus adds it to every norm; see DPOptimizer.clip_and_accumulate


@dataclass(frozen=True)
class Reference:
    """Per-sample gradients from batches of one.

    Attributes:
        gradients: one mapping per sample, for the parameters that are trained: sketches, of which only sums and comparisons
            are taken.
        norms_of: the Euclidean norm of each gradient, by parameter name, one mapping per sample.
        tolerance: relative error that is allowed for this precision.
        drew: whether something random was drawn in the model or in the loss.
        in_double: the same on a copy of the model in double precision, once it has been run (:mod:`dpfix.audit.exact`).
    """

    gradients: tuple[Gradients, ...]
    norms_of: tuple[Mapping[str, float], ...]
    tolerance: float
    drew: bool = True
    in_double: list[InDouble | None] = field(default_factory=list, compare=False)

    @cached_property
    def norms(self) -> torch.Tensor:
        """The Euclidean norms of the samples' gradients over all parameters, shape ``[samples]``."""
        return torch.tensor([math.hypot(*norms.values()) for norms in self.norms_of], dtype=torch.float64)

    @cached_property
    def clip_norms(self) -> tuple[float, float, float]:
        """A clip norm that clips everything, one that clips half, one that clips nothing."""
        middle, largest = float(self.norms.median()), float(self.norms.max())
        middle = middle or largest
        return 0.05 * middle, middle, 2 * largest

    def clipped_sum(self, clip_norm: float, scheme: Scheme = FLAT) -> Gradients:
        """The sketch of ``sum_i min(1, C / |g_i|) g_i`` for the clip norm C, in single precision at least, by parameter name.

        Args:
            scheme: the way to clip, where it is another.

        Returns:
            The sum.
        """
        if not scheme.groups:
            return weighted_sum(self.gradients, [factor(scheme, clip_norm, float(norm)) for norm in self.norms])
        total: Gradients = {}
        for (_, names), share in zip(scheme.groups, scheme.shares, strict=True):
            parts = [{n: g[n] for n in names} for g in self.gradients]
            norms = [math.hypot(*(of[n] for n in names)) for of in self.norms_of]
            total |= weighted_sum(parts, [factor(scheme, share * clip_norm, norm) for norm in norms])
        return {n: total[n] for n in self.gradients[0]}


def factor(scheme: Scheme, clip_norm: float, norm: float) -> float:
    """What the gradient of a group of parameters is multiplied with, by the definition; engines have their own way to it."""
    if scheme.stability:
        return clip_norm / (norm + scheme.stability)
    return min(1.0, clip_norm / (norm + _EPS))


@dataclass(frozen=True)
class InDouble:
    """A copy of a model in double precision, and what the probe showed on it."""

    subject: Subject
    trial: Trial


@dataclass(frozen=True)
class Trial:
    """A probe, what one step on it showed, and its batch-of-one reference.

    Attributes:
        samples: the probe.
        record: what the step showed.
        wanted: the reference.
        slack: how many times the reference's tolerance an error may be.
        draw: what random operations gave.
    """

    samples: Probe
    record: StepRecord
    wanted: Reference
    slack: float = 1.0
    draw: Draw = DRAWS[0]


@dataclass(frozen=True)
class Trials:
    """Everything that an engine is tried on.

    Attributes:
        ordinary: the probe.
        harder: probes with an empty sample, a rare label, an outlier, as far as the step takes them.
    """

    ordinary: Trial
    harder: tuple[Trial, ...]


def reference(record: StepRecord, unused: Sequence[str], share: float | torch.Tensor = 1.0) -> Reference:
    """The batch-of-one reference of a recorded step.

    Args:
        unused: parameters that are not trained.
        share: what the gradient of a sample's loss is multiplied with, or a number for each: a sum over views is to be their
            mean.

    Returns:
        The reference over the parameters that are trained.

    Raises:
        CoupledModelError: the gradient of a sample alone is not finite.
    """
    return reference_of(record.alone, unused, share, together=record.together)


def reference_of(
    alone: Sequence[Run], unused: Sequence[str], share: float | torch.Tensor, *, together: Run | None = None
) -> Reference:
    """As :func:`reference`, from the step on every sample alone and, if it was run, on all of them together.

    Returns:
        The reference.

    Raises:
        CoupledModelError: the gradient of a sample alone is not finite.
    """
    runs = alone if together is None else (together, *alone)
    low_precision, drew = any(run.low_precision for run in runs), any(run.drew for run in runs)
    gone = set(unused)
    shares = share.tolist() if isinstance(share, torch.Tensor) else [share] * len(alone)
    gradients = tuple(
        {n: g if of_it == 1 else g * of_it for n, g in run.gradients.items() if n not in gone}
        for of_it, run in zip(shares, alone, strict=True)
    )
    norms_of = tuple(
        {n: norm * abs(of_it) for n, norm in run.norms.items() if n not in gone}
        for of_it, run in zip(shares, alone, strict=True)
    )
    if not all(map(math.isfinite, (norm for norms in norms_of for norm in norms.values()))):
        raise CoupledModelError(
            "the gradient of one sample alone is not finite, while DP-SGD needs it for every sample:",
            "the model or the loss in training_step divides by a statistic of the batch (a standard deviation over samples) "
            "or of a constant input.",
            "Make it per sample, or add an epsilon to the denominator.",
            path="training_step",
        )
    dtypes = {g.dtype for run in alone for g in run.gradients.values()}
    tolerance = 5e-2 if low_precision else 1e-6 if dtypes == {torch.float64} else 2e-3
    return Reference(gradients, norms_of, tolerance, drew)

"""The proof: what an engine releases for the probe equals the clipped sum of a batch-of-one reference.

The reference is independent of every engine: the plain model, the user's training step, one sample at a time, ordinary
autograd (:mod:`dpfix.observe.run`). Clipping is the optimizer's own, so what is compared is what would be released.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from dpfix.audit.released import (
    released_sums,
)
from dpfix.engines import Engine
from dpfix.errors import CoupledModelError, DPFixError
from dpfix.instrument.gradients import (
    Gradients,
    gap,
    norm_of,
    relative_error,
    weighted_sum,
)
from dpfix.observe.probe import COLLATE_FAILURES, Probe
from dpfix.observe.record import Run, StepRecord
from dpfix.observe.run import one_by_one
from dpfix.observe.training_step import TrainingStep
from dpfix.plan import Plan
from dpfix.report.report import EngineEvidence

SLACK = 1e-3
"""How much more than C a sample may move the clipped sum, relatively: rounding."""
ROUNDING = 5e-2
"""Up to this error in single precision, double precision decides whether it is one of rounding."""
_EPS = 1e-6  # Opacus adds it to every norm; see DPOptimizer.clip_and_accumulate
_ENGINE_FAILURES = (
    DPFixError,
    RuntimeError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    AttributeError,
    AssertionError,
)


@dataclass(frozen=True)
class Reference:
    """Per-sample gradients from batches of one.

    Attributes:
        gradients: one mapping per sample, for the parameters that are trained.
        norms: their Euclidean norms, shape ``[samples]``.
        tolerance: relative error that is allowed for this precision.
        drew: whether something random was drawn in the model or in the loss.
        in_double: the same on a copy of the model in double precision, once an engine has needed it.
    """

    gradients: tuple[Gradients, ...]
    norms: torch.Tensor
    tolerance: float
    drew: bool = True
    in_double: list[_InDouble] = field(default_factory=list, compare=False)

    @cached_property
    def clip_norms(self) -> tuple[float, float, float]:
        """A clip norm that clips everything, one that clips half, one that clips nothing."""
        middle, largest = float(self.norms.median()), float(self.norms.max())
        middle = middle or largest
        return 0.05 * middle, middle, 2 * largest

    def clipped_sum(self, clip_norm: float) -> Gradients:
        """``sum_i min(1, C / |g_i|) g_i``, in single precision at least.

        Args:
            clip_norm: C.

        Returns:
            The sum by parameter name.
        """
        factors = [min(1.0, clip_norm / (float(norm) + _EPS)) for norm in self.norms]
        return weighted_sum(self.gradients, factors)


def reference(record: StepRecord, unused: Sequence[str], share: float = 1.0) -> Reference:
    """The batch-of-one reference of a recorded step.

    Args:
        record: what the probe showed.
        unused: parameters that are not trained.
        share: what the gradient of a sample's loss is multiplied with: a sum over views is to be their mean.

    Returns:
        The reference over the parameters that are trained.

    Raises:
        CoupledModelError: the gradient of a sample alone is not finite.
    """
    drew = record.together.drew or any(run.drew for run in record.alone)
    return _reference(record.alone, set(unused), share, record.low_precision, drew)


def _reference(runs: Sequence[Run], gone: set[str], share: float, low_precision: bool, drew: bool) -> Reference:
    gradients = tuple(
        {n: g if share == 1 else g * share for n, g in run.gradients.items() if n not in gone} for run in runs
    )
    norms = torch.tensor([norm_of(g) for g in gradients], dtype=torch.float64)
    if not bool(torch.isfinite(norms).all()):
        raise CoupledModelError(
            "the gradient of one sample alone is not finite, while DP-SGD needs it for every sample: the model or the "
            "loss in training_step divides by a statistic of the batch (a standard deviation over samples) or of "
            "a constant input. Make it per sample, or add an epsilon to the denominator."
        )
    dtypes = {g.dtype for run in runs for g in run.gradients.values()}
    tolerance = 5e-2 if low_precision else 1e-6 if dtypes == {torch.float64} else 2e-3
    return Reference(gradients, norms, tolerance, drew)


def check_engine(
    engine: Engine,
    module: nn.Module,
    step: TrainingStep,
    probe: Probe,
    plan: Plan,
    wanted: Reference,
    clip_norms: tuple[float, ...],
    left_out: int | None = None,
    *,
    slack: float = 1.0,
) -> EngineEvidence:
    """Compare what an engine releases for a probe with the reference.

    Args:
        engine: the engine.
        module: the repaired model.
        step: from batch to loss.
        probe: the samples.
        plan: how the model is to be trained with this engine.
        wanted: the batch-of-one reference.
        clip_norms: the clip norms at which they are compared; those of the reference, or some of them.
        left_out: number of a sample; if given, leaving it out may move the sum by at most C.
        slack: how many times the reference's tolerance an error may be.

    Returns:
        The evidence: passed, the largest error, or what went wrong.
    """
    try:
        sums = released_sums(engine, module, step, probe, plan, clip_norms, drew=wanted.drew)
        fewer = sums[:0]
        if left_out is not None:
            without = probe.without(left_out)
            fewer = released_sums(engine, module, step, without, plan, clip_norms, drew=wanted.drew)
    except _ENGINE_FAILURES as error:
        text = " ".join(str(error).split())[:160]
        return EngineEvidence(engine.name, passed=False, reason=f"{type(error).__name__}: {text}")
    worst, where = 0.0, ""
    for found, clip_norm in zip(sums, clip_norms, strict=True):
        error, name = relative_error(found, wanted.clipped_sum(clip_norm))
        if not error <= worst:
            worst, where = error, name
    if not worst <= slack * wanted.tolerance and not (
        worst <= ROUNDING and _equal_in_double(engine, module, step, probe, plan, wanted, clip_norms)
    ):
        reason = f"its clipped sum differs from the batch-of-one reference by {worst:.1e} (`{where}`)"
        return EngineEvidence(engine.name, passed=False, max_error=worst, reason=reason)
    moved = max((movement(a, b, c) for a, b, c in zip(sums, fewer, clip_norms, strict=False)), default=0.0)
    if not moved <= 1 + max(SLACK, wanted.tolerance if wanted.tolerance > 2e-3 else 0):
        reason = f"one sample moves its clipped sum by {moved:.3f} times the clip norm"
        return EngineEvidence(engine.name, passed=False, max_error=worst, reason=reason)
    return EngineEvidence(engine.name, passed=True, max_error=worst)


@dataclass(frozen=True)
class _InDouble:
    """A model, its probe and its reference in double precision."""

    module: nn.Module
    samples: Probe
    wanted: Reference


def _equal_in_double(
    engine: Engine, module: nn.Module, step: TrainingStep, probe: Probe, plan: Plan, wanted: Reference, clip_norms: Any
) -> bool:
    """Whether the engine equals the reference on a copy in double precision: what is left is then rounding."""
    if {p.dtype for p in module.parameters()} != {torch.float32}:
        return False
    try:
        if not wanted.in_double:
            wanted.in_double.append(_in_double(module, step, probe, plan))
        exact = wanted.in_double[0]
        sums = released_sums(engine, exact.module, step, exact.samples, plan, clip_norms, drew=exact.wanted.drew)
    except (*_ENGINE_FAILURES, *COLLATE_FAILURES):
        return False  # a model or a loss with single precision written into it
    tolerance = exact.wanted.tolerance
    errors = [relative_error(s, exact.wanted.clipped_sum(c))[0] for s, c in zip(sums, clip_norms, strict=True)]
    return tolerance < 1e-5 and max(errors) <= tolerance


def _in_double(module: nn.Module, step: TrainingStep, probe: Probe, plan: Plan) -> _InDouble:
    exact = copy.deepcopy(module).double()
    samples = probe.changed(lambda i, path, leaf: _double(leaf), len(probe))
    runs = one_by_one(exact, step, samples)
    low_precision, drew = any(run.low_precision for run in runs), any(run.drew for run in runs)
    return _InDouble(exact, samples, _reference(runs, set(plan.frozen_parameters), plan.share, low_precision, drew))


def _double(leaf: Any) -> Any:
    floating = isinstance(leaf, (torch.Tensor, np.ndarray)) and leaf.dtype in {torch.float32, np.dtype("float32")}
    if not floating:
        return leaf
    return leaf.double() if isinstance(leaf, torch.Tensor) else leaf.astype(np.float64)


def movement(every: Gradients, fewer: Gradients, clip_norm: float) -> float:
    """How far leaving a sample out moves the clipped sum.

    Args:
        every: the clipped sum of all samples.
        fewer: the clipped sum without one of them.
        clip_norm: C.

    Returns:
        The Euclidean distance as a multiple of C.
    """
    return sum(gap(every[n], fewer[n]) ** 2 for n in every) ** 0.5 / clip_norm if clip_norm > 0 else 0.0

"""The proof: what an engine releases for the probe equals the clipped sum of a batch-of-one reference.

Clipping is the optimizer's own, so what is compared is what would be released.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from dpfix.audit.exact import ROUNDING, drift, in_double, own_rounding
from dpfix.audit.reference import Reference, Trial, reference_of
from dpfix.audit.released import released_sums
from dpfix.engines import Engine
from dpfix.errors import USER_CODE_ERRORS, DPFixError
from dpfix.instrument.gradients import Gradients, gap, relative_error, sketched
from dpfix.observe.one_step import alone_and_together
from dpfix.observe.training_step import Subject
from dpfix.plan import Plan
from dpfix.report.report import EngineEvidence

SLACK = 1e-3
"""How much more than C a sample may move the clipped sum, relatively: rounding."""


def check_engine(
    engine: Engine,
    subject: Subject,
    trial: Trial,
    plan: Plan,
    clip_norms: tuple[float, ...] = (),
    left_out: int | None = None,
) -> EngineEvidence:
    """Compare what an engine releases for a probe with the reference.

    Args:
        plan: how the model is to be trained; with this engine, whatever it says about that.
        clip_norms: the clip norms at which they are compared; those of the reference if not given.
        left_out: number of a sample; if given, leaving it out may move the sum by at most C.

    Returns:
        The evidence: passed, the largest error, or what went wrong.
    """
    plan = plan.with_engine(engine)
    wanted = trial.wanted
    clip_norms = clip_norms or wanted.clip_norms
    kept = sketched if left_out is None else dict  # how far a sample moves a sum is to be known exactly
    try:
        sums = released_sums(engine, subject, trial, plan, clip_norms, kept)
        fewer = sums[:0]
        if left_out is not None:
            without = replace(trial, samples=trial.samples.without(left_out))
            fewer = released_sums(engine, subject, without, plan, clip_norms, kept)
    except (DPFixError, *USER_CODE_ERRORS) as error:
        text = " ".join(str(error).split())[:160]
        return EngineEvidence(engine.name, passed=False, reason=f"{type(error).__name__}: {text}")
    errors = _errors(sums, wanted, plan, clip_norms)
    worst, where = max(errors, key=lambda error: error[0], default=(0.0, ""))
    allowed = trial.slack * wanted.tolerance
    if not worst <= allowed and not _is_rounding([e for e, _ in errors], engine, subject, trial, plan, clip_norms):
        now = _compared_now(sums, subject, trial, plan, clip_norms)
        if not now <= allowed:
            reason = f"its clipped sum differs from the batch-of-one reference by {worst:.1e} (`{where}`)"
            return EngineEvidence(engine.name, passed=False, max_error=worst, reason=reason)
        worst = now
    moved = max((movement(a, b, c) for a, b, c in zip(sums, fewer, clip_norms, strict=False)), default=0.0)
    if not moved <= 1 + max(SLACK, wanted.tolerance if wanted.tolerance > 2e-3 else 0):
        reason = f"one sample moves its clipped sum by {moved:.3f} times the clip norm"
        return EngineEvidence(engine.name, passed=False, max_error=worst, reason=reason)
    return EngineEvidence(engine.name, passed=True, max_error=worst)


def _errors(
    sums: Sequence[Gradients], wanted: Reference, plan: Plan, clip_norms: tuple[float, ...]
) -> list[tuple[float, str]]:
    """The relative error of every clipped sum, one per clip norm, and the parameter where it is largest."""
    return [
        relative_error(sketched(found), wanted.clipped_sum(c, plan.clipping))
        for found, c in zip(sums, clip_norms, strict=True)
    ]


def _compared_now(
    sums: Sequence[Gradients], subject: Subject, trial: Trial, plan: Plan, clip_norms: tuple[float, ...]
) -> float:
    """The largest error against a reference that is taken now, where the step gives another gradient than it gave then.

    A weight that grows with every call is a part of the loss; it is no fault of an engine that was run long after the first
    reference. The engine is not run again: one that is wrong now and then has no second chance.

    Args:
        sums: what the engine has released.

    Returns:
        The error; infinite where the step gives what it gave, or none.
    """
    try:
        if not drift(subject, trial):
            return math.inf
        alone, _ = alone_and_together(subject, trial.samples, trial.record.together, trial.draw)
        wanted = reference_of(alone, plan.frozen_parameters, plan.share(trial.record.counts))
    except (DPFixError, *USER_CODE_ERRORS):
        return math.inf
    return max(error for error, _ in _errors(sums, wanted, plan, clip_norms))


def _is_rounding(
    errors: Sequence[float], engine: Engine, subject: Subject, trial: Trial, plan: Plan, clip_norms: tuple[float, ...]
) -> bool:
    """Whether the engine equals the reference on a copy in double precision: what is left is then rounding.

    It is no more than a limit, or than what rounding does to the reference itself.

    Args:
        errors: in single precision, one per clip norm.

    Returns:
        Whether that is so.
    """
    exact = in_double(subject, trial, plan)
    if exact is None or any(
        not error <= max(ROUNDING, 2 * own_rounding(trial, exact, c, plan.clipping))
        for error, c in zip(errors, clip_norms, strict=True)
    ):
        return False
    wanted = exact.trial.wanted
    try:
        sums = released_sums(engine, exact.subject, exact.trial, plan, clip_norms, sketched)
    except (DPFixError, *USER_CODE_ERRORS):
        return False  # a model or a loss with single precision written into it
    return max(error for error, _ in _errors(sums, wanted, plan, clip_norms)) <= wanted.tolerance


def movement(every: Gradients, fewer: Gradients, clip_norm: float) -> float:
    """How far leaving a sample out moves the clipped sum.

    Args:
        fewer: the clipped sum without one of them.

    Returns:
        The Euclidean distance as a multiple of C.
    """
    return sum(gap(every[n], fewer[n]) ** 2 for n in every) ** 0.5 / clip_norm if clip_norm > 0 else 0.0

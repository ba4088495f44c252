"""Sample i must not feel sample j: not in the model, not in the loss.

What is compared are outputs and gradients, not loss values: gradients can differ by a hundred times more than values. Where
the model can run in double precision and that is cheap, or where single precision leaves a doubt, double precision decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from dpfix.audit.blame import differs, mixing
from dpfix.audit.exact import drift, in_double, is_small, run_in_double
from dpfix.audit.loss_causes import coupling_causes, telling_numbers
from dpfix.audit.loss_probes import Coupling, LossProbes, try_losses
from dpfix.audit.reference import Trial
from dpfix.audit.way_out import way_out
from dpfix.errors import CoupledLossError, CoupledModelError, LossError, TrainingStepError
from dpfix.instrument import pytree
from dpfix.instrument.gradients import gap, weighted_sum
from dpfix.observe.record import StepRecord
from dpfix.observe.training_step import Subject
from dpfix.plan import Plan
from dpfix.report.finding import Finding
from dpfix.report.report import Proof

_DOUBT = 1e-4
"""Relative difference of an output in single precision from which on double precision is asked, where it is dear."""
_DOUBT_GRADIENT = 2e-3
"""The same for the gradient of a parameter, relative to its own size."""
_EXACT = 1e-7
"""Relative difference in double precision that is rounding."""
_DOUBT_FLOOR = 1e-2
_FLOOR = 1e-6
"""The gradient of a parameter may be zero but for rounding; it counts for so much of that of all at least."""
_SHRUNK = 1e-6
"""An error that is so much smaller in double precision than in single was rounding, which shrinks to 2^-29: where a constant
sample is normalised, it makes more than :data:`_EXACT` of a gradient that is zero. Coupling stays as it is."""
_PAIR = 2
"""Samples that double precision is tried on where nothing is in doubt."""


@dataclass(frozen=True)
class Isolated:
    """No sample feels another one.

    Attributes:
        proofs: what was shown, for the report.
        inputs: places in a sample that the model sees, or that may be such.
    """

    proofs: list[Proof]
    inputs: tuple[pytree.Path, ...]


def check_ordinary(subject: Subject, trial: Trial, plan: Plan, criterion: Callable[..., Any] | None) -> Isolated:
    """The ordinary probe: sample i must not feel sample j, first in the model's outputs, then in the loss.

    The loss is tried on many other labels, too.

    Args:
        trial: the samples, what they showed, and the reference.
        plan: for the loss reduction.
        criterion: the criterion of the call, to name the cause of a coupling.

    Returns:
        The proofs.

    Raises:
        CoupledModelError: an output of the model mixes samples.
        CoupledLossError: the loss does.
        LossError: it is a sum where a mean was announced, or the other way round.
        TrainingStepError: no parameter gets a gradient.
    """
    step, told = subject.step, telling_numbers(criterion, subject.step.run)
    judged = _judged(subject, trial, plan, always=is_small(subject, trial))
    judged.check_model()
    refuse = _Refusal(subject, trial, plan, criterion)
    try:
        judged.check_loss(plan, refuse)
    except _OtherReductionError as other:
        tried = try_losses(subject, trial, replace(plan, loss_reduction=other.reduction), told)
        raise (refuse.coupled(tried.coupling) if tried.coupling else refuse.other_reduction(other.reduction)) from None
    tried = try_losses(subject, trial, plan, told)
    if tried.coupling is not None:
        raise refuse.coupled(tried.coupling)
    if judged.errors.size == 0:
        raise TrainingStepError(
            f"no parameter of {type(subject.module).__name__} gets a gradient from training_step ({step.origin}).",
            help="Check the loss, requires_grad of the parameters, and detach or no_grad in forward.",
            path="training_step",
        )
    kind = "loss" if step.loss_known else "stand-in loss"
    precision = "double precision" if judged.exact else "single precision"
    return Isolated(
        [
            Proof(
                "isolated",
                f"outputs of the model in a batch of {len(trial.samples)} equal those of single samples ({precision})",
                "every output of the model for a batch, and for each sample alone",
                {"samples": len(trial.samples)},
            ),
            Proof(
                "isolated",
                f"the gradient of the batch is the {plan.loss_reduction} of the single samples' ({kind}: {step.origin})",
                "the gradient of every parameter for a batch, and for each sample alone",
                {"largest relative error": judged.errors.own if judged.exact else judged.errors.of_all},
            ),
            *_other_labels(tried),
        ],
        tried.inputs,
    )


def _other_labels(tried: LossProbes) -> list[Proof]:
    if tried.tried < 2:
        return []
    return [
        Proof(
            "isolated",
            f"the same for the loss on {tried.tried - 1} other set(s) of labels: rare, missing, ignored, alike, all different, "
            "as far as samples, settings and code name such values",
            "the loss of a batch, and of each sample alone, on other labels",
            {"sets of labels": tried.tried - 1},
        )
    ]


def check_isolation(subject: Subject, trial: Trial, plan: Plan, criterion: Callable[..., Any] | None = None) -> None:
    """The same on a harder probe, or under another draw, on its own labels.

    Raises:
        CoupledModelError: an output of the model mixes samples.
        CoupledLossError: the loss does.
    """
    judged = _judged(subject, trial, plan)
    judged.check_model()
    refuse = _Refusal(subject, trial, plan, criterion)
    try:
        judged.check_loss(plan, refuse)
    except _OtherReductionError as other:
        raise refuse.other_reduction(other.reduction) from None


@dataclass(frozen=True)
class _Judged:
    """What is judged: a trial, or the same on a copy of the model in double precision.

    Attributes:
        subject: the model and the step.
        trial: the samples and what they showed.
        errors: how far the batch's gradient is off.
        exact: whether it is the copy.
    """

    subject: Subject
    trial: Trial
    errors: _Errors
    exact: bool = False

    def check_model(self) -> None:
        """No output of the model may mix the samples.

        Raises:
            CoupledModelError: one does.
        """
        allowed = _EXACT if self.exact else 10 * self.trial.wanted.tolerance
        coupled = _coupled_output(self.trial, allowed)
        if coupled and self.exact:
            allowed = self._exact()
            coupled = _coupled_output(self.trial, allowed)
        if coupled:
            raise CoupledModelError(mixing(self.subject, self.trial, coupled, allowed))

    def _exact(self) -> float:
        """What is rounding in double precision: more where the step itself changes from call to call."""
        return max(_EXACT, 10 * drift(self.subject, self.trial))

    def check_loss(self, plan: Plan, refuse: _Refusal) -> None:
        """The batch's gradient has to be the mean (or sum) of the single samples' gradients.

        Raises:
            _OtherReductionError: it is a sum where a mean was announced, or the other way round.
            CoupledLossError: it is neither.
        """
        allowed = _EXACT if self.exact else 5 * self.trial.wanted.tolerance
        error = self.errors.own if self.exact else self.errors.of_all
        if error <= allowed or (self.exact and error <= self._exact()):
            return
        other = replace(plan, loss_reduction="sum" if plan.loss_reduction == "mean" else "mean")
        if _errors(self.trial.record, other).of_all <= allowed:
            raise _OtherReductionError(other.loss_reduction)
        raise refuse.coupled(Coupling(error), self.errors.name)


def _judged(subject: Subject, trial: Trial, plan: Plan, *, always: bool = False) -> _Judged:
    """The trial on a copy in double precision if it is small or in doubt, and can be run so; else the trial."""
    found, exact = _errors(trial.record, plan), None
    if found.own > _DOUBT_GRADIENT * trial.slack or _coupled_output(trial, _DOUBT * trial.slack):
        exact = in_double(subject, trial, plan)
    elif always:
        exact = run_in_double(subject, trial, plan, _PAIR)
    if exact is None:
        return _Judged(subject, trial, found)
    of_same = found.each if len(exact.trial.samples) == len(trial.samples) else {}
    return _Judged(exact.subject, exact.trial, _errors(exact.trial.record, plan, _FLOOR, of_same), exact=True)


def weighted_by_rows(trial: Trial, plan: Plan) -> bool:
    """Whether a sample weighs as much in the loss as it has rows, where samples have different numbers of them.

    Returns:
        True if the gradient of the batch shows that (a mean over all rows) rather than the same weight for all samples: where
        their gradients are nearly alike, that is a small difference.
    """
    record, tolerance = trial.record, trial.wanted.tolerance
    if not record.counts or plan.loss_reduction == "sum":
        return False
    equal, by_rows = (_errors(record, replace(plan, weighted_by_rows=by)).of_all for by in (False, True))
    return by_rows <= min(5 * tolerance, equal / 2)


def _coupled_output(trial: Trial, allowed: float) -> str:
    record = trial.record
    alone = [run.calls.get("", []) for run in record.alone]
    for number, call in enumerate(record.together.calls.get("", [])):
        parts = [pytree.tensors(calls[number].output) for calls in alone if number < len(calls)]
        for k, tensor in enumerate(pytree.tensors(call.output)):
            problem = differs(tensor, [p[k] for p in parts if k < len(p)], allowed, record.counts)
            if problem:
                return problem
    return ""


class _OtherReductionError(Exception):
    """The loss is a sum where a mean was announced, or the other way round; caught inside this file."""

    def __init__(self, reduction: str) -> None:
        super().__init__(reduction)
        self.reduction = reduction


@dataclass(frozen=True)
class _Refusal:
    """Says what is wrong with a loss, and how to get out."""

    subject: Subject
    trial: Trial
    plan: Plan
    criterion: Callable[..., Any] | None

    def other_reduction(self, other: str) -> LossError:
        """The loss is a sum over the samples where a mean was announced, or the other way round."""
        announced = self.plan.loss_reduction
        return LossError(
            Finding.refusal(
                "DPF015",
                f"the loss in training_step is a {other} over the samples, but loss_reduction='{announced}' was announced.",
                "per-sample gradients would be scaled by the batch size before clipping.",
                f"pass loss_reduction='{other}', or use reduction='{announced}' in the criterion.",
                path="loss_reduction",
            )
        )

    def coupled(self, coupling: Coupling, name: str = "") -> CoupledLossError:
        """The loss couples the samples."""
        step, reduction = self.subject.step, self.plan.loss_reduction
        causes = coupling_causes(self.criterion, step.run, self.trial.samples.batch)
        known = "; ".join(causes) or (
            "a mean over the valid elements of the batch (ignore_index), class weights with reduction='mean', batch=True in "
            "a Dice loss, a contrastive or rank loss"
        )
        what = f"the gradient of `{name}`" if name else "the gradient of one sample's output"
        when = f", {coupling.when}" if coupling.when else ""
        given = "criterion" if self.criterion is not None else "training_step"
        return CoupledLossError(
            Finding.refusal(
                "DPF014",
                f"the loss of the batch is not the {reduction} of the losses of its samples: {what} differs "
                f"{_by(coupling.error)}{when} ({step.origin}).",
                "one sample's share of the loss depends on the others, so clipping per sample bounds nothing. "
                f"{'Cause' if causes else 'Known causes'}: {known}.",
                way_out(self.subject, self.trial, self.plan, self.criterion),
                path=name or given,
            )
        )


def _by(error: float) -> str:
    return f"by {error:.1e} (relative)" if error < 10 else "more than tenfold"


@dataclass(frozen=True)
class _Errors:
    """How far a batch's gradient is from what the single samples' give: the largest error of a parameter.

    Attributes:
        own: relative to the size of its own gradients.
        of_all: relative to that of the gradients of all parameters.
        name: its name.
        size: the size of all gradients.
        each: the error of every parameter, by name.
    """

    own: float
    of_all: float
    name: str
    size: float
    each: Mapping[str, float]


def _errors(
    record: StepRecord, plan: Plan, floor: float = _DOUBT_FLOOR, in_single: Mapping[str, float] | None = None
) -> _Errors:
    """How far the batch's gradient is from the weighted sum of the single samples'.

    Args:
        floor: the gradients of a parameter count for so much of that of all at least.
        in_single: errors of the same in single precision; those that have nearly gone with it were rounding.

    Returns:
        The errors.
    """
    weight = plan.weight(len(record.alone), record.counts)
    weights = weight.tolist() if isinstance(weight, torch.Tensor) else [weight] * len(record.alone)
    mean = sum(weights) / len(weights)
    parts = weighted_sum([run.gradients for run in record.alone], [w / mean for w in weights])
    norms = [run.norms for run in record.alone]
    size = sum(math.hypot(*of_run.values()) for of_run in norms)
    own, of_all, where, each = 0.0, 0.0, "", dict[str, float]()
    for name, value in parts.items():
        error = gap(record.together.gradients[name], value, 1 / mean)
        each[name] = error = error if error == error else math.inf
        if in_single and error <= _SHRUNK * in_single.get(name, 0.0) < math.inf:
            continue
        of_all = max(of_all, error / max(size, 1e-12))
        relative = error / max(sum(of_run[name] for of_run in norms), floor * size, 1e-12)
        if relative > own:
            own, where = relative, name
    return _Errors(own, of_all, where, size, each)

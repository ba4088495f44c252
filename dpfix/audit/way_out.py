"""The way out of a coupled loss: only what has been tried, or what is true of every loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dpfix.audit.loss_causes import referenced, telling_numbers
from dpfix.audit.loss_probes import try_losses
from dpfix.audit.reference import Trial
from dpfix.observe.training_step import Subject, infer
from dpfix.plan import Plan
from dpfix.repair.per_sample_loss import PerSampleLoss

_CRITERION = (
    "criterion = dpfix.PerSampleLoss(criterion)  # applies any criterion to every sample alone, then averages; use it in the "
    "loop and in training_step."
)
_BY_HAND = (
    "reduce the loss in two steps: over the elements of each sample by themselves (outputs[i : i + 1] with labels[i : i + 1]), "
    "then the {reduction} over the samples. dpfix.PerSampleLoss(criterion) does that for a criterion that gets the outputs "
    "and labels of all samples in dimension 0, in loop and training_step. A loss that compares the samples of a batch "
    "(contrastive, rank, decorrelation) has no such form: leave it out."
)


def way_out(subject: Subject, trial: Trial, plan: Plan, criterion: Callable[..., Any] | None) -> str:
    """What helps against a loss that couples the samples.

    Returns:
        ``PerSampleLoss``, where a try shows that it cures the loss; else how such a loss is written.
    """
    by_hand = _BY_HAND.format(reduction=plan.loss_reduction)
    losses = list(referenced(criterion, subject.step.run))
    if any(isinstance(loss, PerSampleLoss) for loss in losses):
        return by_hand.replace("dpfix.PerSampleLoss(criterion) does", "dpfix.PerSampleLoss around all of the loss does")
    if criterion is None:
        return by_hand
    cured = infer(trial.samples.batch, PerSampleLoss(criterion), None, plan.loss_reduction)
    tried = try_losses(Subject(subject.module, cured), trial, plan, telling_numbers(criterion, None))
    return _CRITERION if tried.coupling is None and tried.tried else by_hand

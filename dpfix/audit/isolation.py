"""Sample i must not feel sample j: not in the model, not in the loss.

What is compared are outputs and gradients, not loss values: gradients can differ by a hundred times more than values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dpfix.audit.loss_causes import coupling_causes
from dpfix.audit.reference import Trial
from dpfix.errors import CoupledLossError, CoupledModelError, LossError, TrainingStepError
from dpfix.instrument import pytree
from dpfix.instrument.fixed_randomness import FixedRandomness
from dpfix.instrument.gradients import gap, norm_of, weighted_sum
from dpfix.instrument.module_state import traceless
from dpfix.instrument.source import describe_module
from dpfix.layout.infer import sample_dim
from dpfix.layout.rows import Rows
from dpfix.observe.record import StepRecord
from dpfix.observe.training_step import Subject
from dpfix.plan import Plan
from dpfix.report.finding import Finding


def check_isolation(
    subject: Subject, trial: Trial, plan: Plan, criterion: Callable[..., Any] | None = None
) -> list[str]:
    """Sample i must not feel sample j: first in the model's outputs, then in the loss.

    Args:
        trial: the samples, what they showed, and the reference.
        plan: for the loss reduction.
        criterion: the criterion of the call, to name the cause of a coupling.

    Returns:
        One line per proof, for the report.

    Raises:
        CoupledModelError: an output of the model mixes samples.
        CoupledLossError: the loss does.
        LossError: it is a sum where a mean was announced, or the other way round.
        TrainingStepError: no parameter gets a gradient.
    """
    coupled = _coupled_output(trial)
    if coupled:
        culprit = _first_coupled_module(subject, trial)
        raise CoupledModelError(
            Finding.refusal(
                "DPF013",
                f"{describe_module(subject.module, culprit)} mixes the samples of a batch: {coupled}.",
                "sample i's output depends on sample j, so clipping per sample bounds nothing.",
                "replace what is computed over the batch (a mean, a normalisation, an attention over dimension 0) by "
                "something per sample. training_step was run on the whole probe batch and on single samples.",
                path=culprit,
            )
        )
    step = subject.step
    _check_loss(subject, trial, plan, lambda: coupling_causes(criterion, step.run, trial.samples.batch))
    kind = "loss" if step.loss_known else "stand-in loss"
    return [
        f"isolated: outputs of the model in a batch of {len(trial.samples)} equal those of single samples",
        f"isolated: the gradient of the batch is the {plan.loss_reduction} of the single samples' ({kind}: "
        f"{step.origin})",
    ]


def weighted_by_rows(trial: Trial, plan: Plan) -> bool:
    """Whether a sample weighs as much in the loss as it has rows, where samples have different numbers of them.

    Returns:
        True if the gradient of the batch shows that (a mean over all rows), and not the same weight for all samples.
    """
    record, tolerance = trial.record, trial.wanted.tolerance
    if not record.counts or plan.loss_reduction == "sum":
        return False
    plans = [replace(plan, weighted_by_rows=by_rows) for by_rows in (False, True)]
    equal, by_rows = (_batch_error(record, p.weight(len(record.alone), record.counts))[0] for p in plans)
    return equal > 5 * tolerance >= by_rows


def _coupled_output(trial: Trial) -> str:
    record, tolerance = trial.record, trial.wanted.tolerance
    for number, call in enumerate(record.together.calls[""]):
        parts = [pytree.tensors(run.calls[""][number].output) for run in record.alone if number < len(run.calls[""])]
        for k, tensor in enumerate(pytree.tensors(call.output)):
            problem = _differs(tensor, [p[k] for p in parts if k < len(p)], tolerance, record.counts)
            if problem:
                return problem
    return ""


def _differs(whole: torch.Tensor, parts: list[torch.Tensor], tolerance: float, counts: tuple[int, ...]) -> str:
    """Why a tensor of the batch is not made of those of single samples; empty if it is, or if it cannot be told."""
    if not whole.is_floating_point():
        return ""
    dim, problem = sample_dim(whole, parts, counts)
    if problem or dim is None:
        return ""
    rows = Rows.of(dim, len(parts))
    for i, part in enumerate(parts):
        taken = rows.take(whole, i)
        if taken.shape != part.shape or not part.numel():
            return ""
        scale = max(float(part.abs().max()), 1e-6)
        gap = float((taken - part).abs().max()) / scale
        if not gap <= 10 * tolerance and torch.isfinite(part).all():
            return f"the output for one sample alone differs by {gap:.1e} (relative) from the one in a batch"
    return ""


def _first_coupled_module(subject: Subject, trial: Trial) -> str:
    """Path of the first module, in the order of execution, whose output mixes samples; the root's if it cannot be told."""
    tolerance, counts = trial.wanted.tolerance, trial.record.counts
    whole = _outputs(subject, trial.samples.batch)
    singles = [_outputs(subject, batch) for batch in trial.samples.singles]
    for number, (path, tensors) in enumerate(whole):
        if any(number >= len(s) or s[number][0] != path for s in singles):
            return ""
        for k, tensor in enumerate(tensors):
            parts = [s[number][1][k] for s in singles if k < len(s[number][1])]
            if len(parts) == len(singles) and _differs(tensor, parts, tolerance, counts):
                return path
    return ""


def _outputs(subject: Subject, batch: Any) -> list[tuple[str, list[torch.Tensor]]]:
    """Path and output tensors of every module call of one forward pass."""
    seen: list[tuple[str, list[torch.Tensor]]] = []

    def hook(path: str) -> Any:
        def note(m: nn.Module, args: Any, output: Any) -> None:
            seen.append((path, [t.detach().as_subclass(torch.Tensor) for t in pytree.tensors(output)]))

        return note

    handles = [m.register_forward_hook(hook(path)) for path, m in subject.module.named_modules()]
    try:
        with traceless(subject.module), FixedRandomness():
            subject.step.run(subject.module, batch)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _check_loss(subject: Subject, trial: Trial, plan: Plan, causes: Callable[[], list[str]]) -> None:
    """The batch's gradient has to be the mean (or sum) of the single samples' gradients."""
    record, allowed, origin = trial.record, 5 * trial.wanted.tolerance, subject.step.origin
    samples = len(record.alone)
    error, name, size = _batch_error(record, plan.weight(samples, record.counts))
    if error <= allowed:
        if size == 0:
            raise TrainingStepError(
                f"no parameter of {type(subject.module).__name__} gets a gradient from training_step ({origin}).",
                help="Check the loss, requires_grad of the parameters, and detach or no_grad in forward.",
                path="training_step",
            )
        return
    other = "sum" if plan.loss_reduction == "mean" else "mean"
    if _batch_error(record, replace(plan, loss_reduction=other).weight(samples, record.counts))[0] <= allowed:
        raise LossError(
            Finding.refusal(
                "DPF015",
                f"the loss in training_step is a {other} over the samples, but loss_reduction='{plan.loss_reduction}' was "
                "announced.",
                "per-sample gradients would be scaled by the batch size before clipping.",
                f"pass loss_reduction='{other}', or use reduction='{plan.loss_reduction}' in the criterion.",
                path="loss_reduction",
            )
        )
    told = causes()
    known = (
        "; ".join(told)
        if told
        else "a mean over the valid elements of the batch (ignore_index), class weights with reduction='mean', batch=True in "
        "a Dice loss, a contrastive or rank loss"
    )
    raise CoupledLossError(
        Finding.refusal(
            "DPF014",
            f"the loss of the batch is not the {plan.loss_reduction} of the losses of its samples: the gradient of `{name}` "
            f"differs {_by(error)} ({origin}).",
            "one sample's share of the loss depends on the others, so clipping per sample bounds nothing. "
            f"{'Cause' if told else 'Known causes'}: {known}.",
            "criterion = dpfix.PerSampleLoss(criterion)  # applies any criterion to every sample alone, then averages; use it "
            "in the loop and in training_step.",
            path=name,
        )
    )


def _by(error: float) -> str:
    return f"by {error:.1e} (relative)" if error < 10 else "more than tenfold"


def _batch_error(record: StepRecord, weight: float | torch.Tensor) -> tuple[float, str, float]:
    """How far the batch's gradient is from the weighted sum of the single samples', relative to the size of these.

    Returns:
        The largest error of a parameter, its name, and the size.
    """
    weights = weight.tolist() if isinstance(weight, torch.Tensor) else [weight] * len(record.alone)
    mean = sum(weights) / len(weights)
    parts = weighted_sum([run.gradients for run in record.alone], [w / mean for w in weights])
    size = float(sum(norm_of(run.gradients) for run in record.alone))
    worst, where = 0.0, ""
    for name, value in parts.items():
        error = gap(record.together.gradients[name], value, 1 / mean) / max(size, 1e-12)
        if not error <= worst:
            worst, where = (error if error == error else float("inf")), name
    return worst, where, size

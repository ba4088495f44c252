"""A trial once more, on a copy of the model in double precision: what is left there is no rounding."""

from __future__ import annotations

import copy
import math
import statistics
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from dpfix.audit.reference import InDouble, Trial, reference_of
from dpfix.errors import USER_CODE_ERRORS, DPFixError
from dpfix.instrument.clipping import Scheme
from dpfix.instrument.double_precision import DoublePrecision
from dpfix.instrument.gradients import norm_of, relative_error
from dpfix.instrument.module_state import traceless
from dpfix.observe.one_step import alone_and_together, run_step
from dpfix.observe.training_step import Subject
from dpfix.plan import Plan

ROUNDING = 5e-2
"""Up to this error in single precision, or up to the reference's own, double precision decides whether it is one of rounding."""
_SMALL = 2**20  # parameters and outputs of layers: up to so many numbers, double precision costs next to nothing


def is_small(subject: Subject, trial: Trial) -> bool:
    """Whether a step in double precision is cheap: few parameters, and small outputs of the modules."""
    outputs = sum(int(np.prod(shape)) for call in trial.record.modules for shape in call.shapes)
    return outputs + sum(p.numel() for p in subject.module.parameters()) <= _SMALL


def in_double(subject: Subject, trial: Trial, plan: Plan) -> InDouble | None:
    """The trial on a copy of the model in double precision, run once and kept.

    Returns:
        What it showed; ``None`` where that says nothing: a model or a loss with another precision written into it, or a
        training step that does not use the model it is given.
    """
    if not trial.wanted.in_double:
        trial.wanted.in_double.append(run_in_double(subject, trial, plan, len(trial.samples)))
    return trial.wanted.in_double[0]


def run_in_double(subject: Subject, trial: Trial, plan: Plan, samples: int) -> InDouble | None:
    """As :func:`in_double`, on so many of the samples only.

    Returns:
        What it showed.
    """
    if {p.dtype for p in subject.module.parameters()} != {torch.float32} or trial.record.low_precision:
        return None
    try:
        exact = Subject(copy.deepcopy(subject.module).double(), subject.step)
        probe = trial.samples.changed(lambda i, path, leaf: _double(leaf), samples)
        with DoublePrecision() as precision:
            alone, together = alone_and_together(exact, probe, trial.record.together, trial.draw)
        wanted = reference_of(alone, plan.frozen_parameters, plan.share(trial.record.counts[:samples]))
    except (DPFixError, *USER_CODE_ERRORS):
        return None
    if (
        precision.half
        or wanted.tolerance > 1e-5
        or not _same_function(wanted.gradients, trial.wanted.gradients[:samples])
    ):
        return None
    record = replace(trial.record, together=together, alone=alone, counts=trial.record.counts[:samples])
    return InDouble(exact, Trial(probe, record, wanted, draw=trial.draw))


def drift(subject: Subject, trial: Trial) -> float:
    """How much the step on the first sample has changed since it was run: a weight that every call anneals, for example.

    Returns:
        The relative change of its gradient.
    """
    with traceless(subject.module) as before, DoublePrecision():
        again = run_step(subject, trial.samples.singles[0], before, draw=trial.draw).gradients
    return relative_error(again, trial.record.alone[0].gradients)[0]


def _same_function(exact: Any, single: Any) -> bool:
    """Whether the copy computes what the model does: one that the step does not use has no gradients.

    Rounding alone may change a sample's gradient altogether: where a normalisation divides by nearly nothing.

    Returns:
        Whether that may be so.
    """
    errors = [relative_error(a, b)[0] for a, b in zip(exact, single, strict=True) if norm_of(b)]
    return all(map(math.isfinite, errors)) and (not errors or statistics.median(errors) <= 0.5)


def own_rounding(trial: Trial, exact: InDouble, clip_norm: float, scheme: Scheme) -> float:
    """How far the clipped sum of the reference itself is from the one in double precision.

    Args:
        trial: in single precision.
        exact: the same in double precision.
        scheme: how it is clipped.

    Returns:
        The relative error, as that of an engine is measured.
    """
    single, double = (one.wanted.clipped_sum(clip_norm, scheme) for one in (trial, exact.trial))
    return relative_error(single, double)[0]


def _double(leaf: Any) -> Any:
    floating = isinstance(leaf, (torch.Tensor, np.ndarray)) and leaf.dtype in {torch.float32, np.dtype("float32")}
    if not floating:
        return leaf
    return leaf.double() if isinstance(leaf, torch.Tensor) else leaf.astype(np.float64)

"""From the user's objects to a plan: scan, repair, observe, audit, choose."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from opacus.validators import ModuleValidator
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from dpfix.audit.clipped_sum import reference
from dpfix.audit.isolation import check_isolation, weighted_by_rows
from dpfix.audit.persistent_state import check_outside, check_state, kept, modules_outside
from dpfix.choose import select
from dpfix.choose.select import Trial
from dpfix.choose.settings import settings, versions
from dpfix.distributed import ALONE, Ranks
from dpfix.errors import (
    CoupledModelError,
    LoaderError,
    LossError,
    ModelError,
    TrainingStepError,
)
from dpfix.instrument.rng import rng_untouched
from dpfix.instrument.source import warn_user
from dpfix.layout.row_count import RowCounter, find_row_counters
from dpfix.observe import loss_trace, no_grad_search, probe
from dpfix.observe.failures import described_failures
from dpfix.observe.notes import frozen, observed, regions, replaced_sampler, scratch
from dpfix.observe.probe import COLLATE_FAILURES
from dpfix.observe.record import StepRecord
from dpfix.observe.run import decided_by_rounding, observe
from dpfix.observe.training_step import StepFunction, TrainingStep, infer
from dpfix.plan import Plan
from dpfix.repair.lazy import materialise, remembered_lazy
from dpfix.repair.surgery import Surgery
from dpfix.report.finding import Finding, Fixability, Severity
from dpfix.report.report import EngineEvidence, Report
from dpfix.rules import RULES, Rule
from dpfix.sampling.augmentation import AugmentationMultiplicity
from dpfix.sampling.collate import KnownRows, Placeholder
from dpfix.sampling.rate import batch_size
from dpfix.scan.options import Options
from dpfix.scan.scan import Scan, run_rules


@dataclass(frozen=True)
class Request:
    """One call: the user's objects and what is asked for.

    Attributes:
        module: the model.
        optimizer: the optimizer.
        data_loader: the loader.
        criterion: the loop's loss function, if given.
        training_step: from batch to loss, if given.
        batch_first: whether Opacus's engines find the samples in dimension 0.
        loss_reduction: ``"mean"`` or ``"sum"``.
        options: everything else.
        augmentation: makes several views of every sample, if that is asked for.
        ranks: the processes that make this call together.
    """

    module: nn.Module
    optimizer: Optimizer
    data_loader: DataLoader[Any]
    criterion: Callable[..., Any] | None
    training_step: StepFunction | None
    batch_first: bool
    loss_reduction: str
    options: Options
    augmentation: AugmentationMultiplicity | None = None
    ranks: Ranks = ALONE

    @property
    def scan(self) -> Scan:
        """The objects as the rules see them."""
        return Scan(self.module, self.optimizer, self.data_loader, self.options)


@dataclass(frozen=True)
class Prepared:
    """Everything that was found out before the hand-off.

    Attributes:
        plan: how the model is to be trained.
        placeholder: what an empty draw delivers.
        known_rows: what the loader has to see in every sample, if it has several rows.
        findings: what was found.
        evidence: what was measured about the engines.
        proofs: one line per proof.
    """

    plan: Plan
    placeholder: Placeholder
    known_rows: KnownRows | None
    findings: tuple[Finding, ...]
    evidence: tuple[EngineEvidence, ...]
    proofs: tuple[str, ...]

    def report(self, call: Request, noise_multiplier: float | None) -> Report:
        """The report of the call.

        Args:
            call: the call.
            noise_multiplier: the noise; ``None`` in a diagnosis.

        Returns:
            The report.
        """
        return Report(
            type(call.module).__name__,
            self.findings,
            self.plan.engine,
            self.evidence,
            self.proofs,
            settings(
                call.data_loader, call.options, call.loss_reduction, noise_multiplier, self.plan.views, call.ranks.size
            ),
            versions(),
        )


def prepare(call: Request, surgery: Surgery) -> Prepared:
    """Scan, repair, observe, audit, choose. Leaves the repaired model, and nothing else, behind.

    Args:
        call: the call.
        surgery: the transaction that repairs go through.

    Returns:
        The plan and the evidence for it.
    """
    loss_trace.switch_off_all()
    apart = modules_outside(call.module, call.criterion, call.training_step)
    with kept(apart):
        return _prepare(call, surgery, apart)


def _prepare(call: Request, surgery: Surgery, apart: list[nn.Module]) -> Prepared:
    findings = _repair(call, surgery)
    with rng_untouched():
        size = math.ceil(batch_size(call.data_loader))
        samples = probe.take(call.data_loader, min(probe.SAMPLES, size), call.augmentation)
    step = infer(samples.batch, call.criterion, call.training_step, call.loss_reduction)
    surgery.undo_with(remembered_lazy(call.module))
    if _materialised(call.module, step, samples):
        findings += [f for f in _repair(call, surgery) if f not in findings]
    _check_validator(call, findings)

    record = observe(call.module, step, samples)
    check_state(call.module, record)
    check_outside(call.module, step, samples, apart)
    if record.unused and record.together.used:
        for name in record.unused:
            surgery.freeze(call.module.get_parameter(name))
        findings.append(frozen(call.module, record))
    findings += scratch(record)
    plan = _plan(call, samples, record, step)

    ordinary = Trial(samples, record, reference(record, record.unused, plan.share))
    plan = replace(plan, weighted_by_rows=weighted_by_rows(record, plan, ordinary.wanted.tolerance))
    if call.options.no_grad_regions:
        plan = replace(
            plan, no_grad_regions=no_grad_search.find(call.module, step, samples, record, plan.frozen_parameters)
        )
        findings += regions(plan, len(samples))
    proofs = _isolated(call, step, ordinary, plan)
    harder = _provoke(call, step, ordinary, plan)
    empty = _attempt(call, step, partial(probe.emptied, samples), ordinary, plan)
    plan, evidence = _choose(call, step, ordinary, harder, plan)
    proofs += select.proofs(plan, evidence, ordinary, harder)
    findings += observed(call.module, step, record) + replaced_sampler(call.data_loader, call.options)
    placeholder, known_rows = _placeholder(empty or ordinary, plan), _known_rows(samples, record)
    return Prepared(plan, placeholder, known_rows, tuple(findings), evidence, tuple(proofs))


def _materialised(module: nn.Module, step: TrainingStep, samples: probe.Probe) -> bool:
    with described_failures(step):
        return materialise(module, lambda: step.run(module, samples.batch))


def refuse(found: Sequence[tuple[Rule, Finding]]) -> None:
    """Stop the call if a rule refuses.

    Args:
        found: ``(rule, finding)`` pairs.
    """
    refused = [(rule, finding) for rule, finding in found if finding.refused]
    if refused:
        raise refused[0][0].error([finding for _, finding in refused])


def _repair(call: Request, surgery: Surgery) -> list[Finding]:
    found = run_rules(call.scan, RULES)
    refuse(found)
    surgery.repair(found)
    return [finding for _, finding in found]


def _check_validator(call: Request, findings: list[Finding]) -> None:
    """Whatever Opacus's own validator still flags must have been answered by a finding; nothing slips through."""
    answered = {f.path for f in findings}
    for path, child in call.module.named_modules():
        validator = ModuleValidator.VALIDATORS.get(type(child))
        if validator is None or path in answered or not any(p.requires_grad for p in child.parameters()):
            continue
        for error in validator(child):
            raise ModelError(
                f"DPF018 [blocks-training] {call.scan.place(path)} is refused by Opacus's ModuleValidator: {error}\n"
                "  help: replace the layer as the message says, or freeze it with requires_grad_(False)."
            )


def _plan(call: Request, samples: probe.Probe, record: StepRecord, step: TrainingStep) -> Plan:
    return Plan(
        calls=record.calls,
        layers=record.layers,
        elsewhere=record.elsewhere,
        loss_reduction=call.loss_reduction,
        loss_known=step.loss_known,
        batch_first=call.batch_first,
        frozen_parameters=record.unused if record.together.used else (),
        fixed_norms=tuple(path for path, _ in call.scan.modules(_BatchNorm)),
        scratch=record.scratch,
        views=1 if call.augmentation is None else call.augmentation.k,
        row_counter=_row_counter(call, samples, record.counts, step),
        help_vmap=record.to_help,
    )


def _row_counter(call: Request, samples: probe.Probe, counts: tuple[int, ...], step: TrainingStep) -> RowCounter | None:
    """How the loader tells the rows of every sample, where these are not the same for all."""
    if not counts:
        return None
    counter = next(iter(find_row_counters(samples.items, counts)), None)
    rows = f"the probe's samples enter {type(call.module).__name__} as {', '.join(map(str, counts))} rows"
    if counter is None:
        raise LoaderError(
            f"data_loader: {rows}, and nothing in what the dataset returns has that many entries, so it cannot be told which "
            "rows belong to which sample. Return a list with one entry per row from dataset[i] (and flatten it in the "
            "collate_fn), or give every sample the same number of rows."
        )
    if not step.loss_known:
        raise TrainingStepError(
            f"training_step: {rows}, and neither criterion= nor training_step= was given. Whether the loss gives every row the "
            "same weight, or every sample, decides what is clipped. Pass the loop's criterion or training_step."
        )
    if not call.options.poisson_sampling:
        raise LoaderError(
            f"data_loader: {rows}. Which rows belong to which sample is known for the batches of a private loader only. "
            "Leave poisson_sampling at True, or give every sample the same number of rows."
        )
    return counter


def _known_rows(samples: probe.Probe, record: StepRecord) -> KnownRows | None:
    """What the loader has to look at, where samples enter the model as several rows, or could do so."""
    rows = record.rows_per_sample
    counters = find_row_counters(samples.items, record.counts or (rows,) * len(samples))
    if rows == 1 and not record.counts:  # a length of 1 somewhere inside says little; an item that is a list says it
        counters = [c for c in counters if not c.path and c.dim == 0 and isinstance(samples.items[0], (list, tuple))]
    return KnownRows(None if record.counts else rows, tuple(counters)) if counters else None


def _isolated(call: Request, step: TrainingStep, trial: Trial, plan: Plan) -> list[str]:
    return check_isolation(call.module, step, trial.samples, trial.record, plan, trial.wanted, call.criterion)


_LARGER = 1e6
"""A sample whose gradient is so much larger than the others' (1e21 times in VNet) drowns them in any sum of floats."""


def _provoke(call: Request, step: TrainingStep, ordinary: Trial, plan: Plan) -> tuple[Trial, ...]:
    """Harder probes, as far as the step takes them: the model and the loss are checked on each.

    Returns:
        Those on which an engine is to be checked too. A sample of zeros belongs to none of them: behind a normalisation
        its gradient is made of rounding errors, on which two right engines need not agree.
    """
    trials: list[Trial] = []
    for number, make in enumerate(probe.provoked(ordinary.samples)):
        if number == 1 and trials:
            break  # the first one has every provocation in it
        trial = _attempt(call, step, make, ordinary, plan)
        if trial is not None:
            trials.append(trial)
    return tuple(trials)


def _placeholder(trial: Trial, plan: Plan) -> Placeholder:
    """What an empty draw delivers: one sample without data, whose gradient is dropped, on which the step runs.

    Args:
        trial: the probe with a sample of zeros if the step can take it, else the ordinary one (redrawn values).
        plan: how to count the rows of a sample.

    Returns:
        A batch of one sample.
    """
    finite = [number for number, run in enumerate(trial.record.alone) if math.isfinite(run.loss)]
    chosen = finite[0] if finite else 0
    return Placeholder(trial.samples.singles[chosen], trial.samples.counts(plan.row_counter)[chosen : chosen + 1])


def _choose(
    call: Request, step: TrainingStep, ordinary: Trial, harder: Sequence[Trial], plan: Plan
) -> tuple[Plan, tuple[EngineEvidence, ...]]:
    """The engine and the evidence for it; rank 0 times the engines, the other ranks audit the one that it chose."""
    size = batch_size(call.data_loader) / call.ranks.size
    choose = partial(select.choose, call.module, step, ordinary, harder, plan, call.options, size)
    chosen = choose() if call.ranks.rank == 0 else None
    name = call.ranks.first(chosen[0].engine if chosen else "")
    return chosen or choose(chosen_by_rank_0=name)


def _attempt(
    call: Request, step: TrainingStep, make: Callable[[], probe.Probe], ordinary: Trial, plan: Plan
) -> Trial | None:
    """Check model and loss on a harder probe; ``None`` if the step cannot take it, or if it is the ordinary one."""
    try:
        changed = make()
        if None not in changed.unchanged:
            return None
        record = observe(call.module, step, changed, ordinary.record)
        trial = Trial(changed, record, reference(record, plan.frozen_parameters, plan.share))
    except (TrainingStepError, CoupledModelError, *COLLATE_FAILURES):
        return None  # no legal sample for this model: an index out of range, a division by zero
    if float(trial.wanted.norms.max()) > _LARGER * float(trial.wanted.norms.median()):
        return None
    check_state(call.module, record)
    try:
        _isolated(call, step, trial, plan)
    except (CoupledModelError, LossError):
        if decided_by_rounding(call.module, step, changed, trial.wanted.tolerance):
            return None
        raise
    return trial


def warn_blocked(report: Report) -> None:
    """Warn about what blocks training and was neither repaired nor refused: nobody has to print a report.

    Args:
        report: the report of a call that went through.
    """
    for finding in report.findings:
        if finding.severity is Severity.BLOCKS_TRAINING and finding.fixability is Fixability.NOTHING:
            warn_user(str(finding))

"""From the user's objects to a plan: scan, repair, observe, audit, choose."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dpfix.audit.isolation import check_isolation, weighted_by_rows
from dpfix.audit.persistent_state import check_inside, check_outside, modules_outside, undone_after
from dpfix.audit.reference import Trial, Trials, reference
from dpfix.choose import select
from dpfix.distributed import fingerprint
from dpfix.errors import (
    USER_CODE_ERRORS,
    CoupledModelError,
    DPFixError,
    LossError,
    NoEngineError,
    TrainingStepError,
)
from dpfix.instrument.rng import rng_untouched
from dpfix.instrument.source import warn_user
from dpfix.observe import double_activation, loss_trace, no_grad_search, probe
from dpfix.observe.call_sources import Call
from dpfix.observe.failures import described_failures
from dpfix.observe.one_step import decided_by_rounding
from dpfix.observe.real_call import Way, check_fixed, learn, together
from dpfix.observe.record import StepRecord, several_rows
from dpfix.observe.recorder import overwritten
from dpfix.observe.run import frozen, observe
from dpfix.observe.several_rows import check_rows, known_rows, row_counter
from dpfix.observe.training_step import Subject, TrainingStep, UnknownCallError, infer, unknown_loss
from dpfix.observe.undecided import decided_later, may_wait, undecided
from dpfix.observe.writes import constant_writes, kept_until_next_call
from dpfix.plan import Plan
from dpfix.repair.lazy import materialise, remembered_lazy
from dpfix.repair.surgery import Surgery
from dpfix.repair.validator import check_validator
from dpfix.report.finding import Finding, Fixability, Severity
from dpfix.report.report import EngineEvidence, Report
from dpfix.rules import RULES, Rule
from dpfix.rules.rule import run_rules
from dpfix.sampling.collate import KnownRows, Placeholder
from dpfix.sampling.fingerprint import data_fingerprint
from dpfix.sampling.rate import batch_size, index_set, replaced_sampler, sample_rate
from dpfix.scan.request import Request


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
        samples: the probe of the loader's dataset.
        repairs: those of the findings that rules have made.
        guess: the step that was looked at, if the loop's own calls of the model may be others.
    """

    plan: Plan
    placeholder: Placeholder
    known_rows: KnownRows | None
    findings: tuple[Finding, ...]
    evidence: tuple[EngineEvidence, ...]
    proofs: tuple[str, ...]
    samples: probe.Probe
    repairs: tuple[Finding, ...]
    guess: TrainingStep | None = None

    def report(self, request: Request, noise_multiplier: float | None, *, secure: bool = False) -> Report:
        """The report of a call; the noise is ``None`` in a diagnosis, ``secure`` says whether it is cryptographic."""
        return Report(
            type(request.module).__name__,
            self.findings,
            self.plan.engine,
            self.evidence,
            self.proofs,
            _settings(request, noise_multiplier) | {"randomness": _randomness(request, secure)},
            versions(),
        )

    def what_is_trained(self, request: Request, noise_multiplier: float) -> dict[str, Any]:
        """What must be the same on all ranks, so that their clipped sums are those of one training."""
        if request.ranks.size == 1:
            return {}
        names = {id(p): name for name, p in request.module.named_parameters()}
        groups, plan = request.optimizer.param_groups, self.plan
        return (
            {
                "noise_multiplier": noise_multiplier,
                "that noise can be computed again": request.privacy.reproducible,
                "the loss reduction": plan.loss_reduction,
                "the options of the call": f"{request.privacy}, {request.performance}",
                "the number of samples": len(index_set(request.data_loader)),
                "the batch size": batch_size(request.data_loader),
                "the engine": plan.engine,
                "the weight of a sample": (plan.weighted_by_rows, plan.views),
                "what no gradient reaches": plan.frozen_parameters,
                "the optimizer": type(request.optimizer).__name__,
                "the order of the optimizer's parameters": [[names[id(p)] for p in g["params"]] for g in groups],
                "the options of the optimizer": [{k: str(v) for k, v in g.items() if k != "params"} for g in groups],
            }
            | data_fingerprint(request.data_loader)
            | fingerprint(request.module)
        )


def _settings(request: Request, noise_multiplier: float | None) -> dict[str, str]:
    """The privacy settings in force, for the report."""
    loader, privacy = request.data_loader, request.privacy
    poisson = f"Poisson, rate {sample_rate(loader):.6g}"
    several = {} if request.views == 1 else {"views per sample": str(request.views)}
    if request.ranks.size > 1:
        several["ranks"] = f"{request.ranks.size}, each works on its part of every batch; rank 0 adds the noise"
    return {
        "noise multiplier": "not set" if noise_multiplier is None else f"{noise_multiplier:g}",
        "clip norm": str(privacy.max_grad_norm),
        "clipping": privacy.clipping,
        "samples": str(len(index_set(loader))),
        "sampling": poisson if privacy.poisson_sampling else "the loader's own",
        "expected batch size": f"{batch_size(loader):g}",
        "loss reduction": privacy.loss_reduction,
    } | several


def _randomness(request: Request, secure: bool) -> str:
    """Where noise and draws come from, in words."""
    if secure:
        return "a cryptographic generator"
    if not request.privacy.reproducible:
        return "the training's own generators, seeded by the operating system"
    given = "seed" if request.privacy.seed is not None else "noise_generator"
    return f"from {given}=, so that the noise can be computed again: it protects nobody from whoever knows that seed"


def versions() -> Mapping[str, str]:
    """Versions of the packages that a report depends on, by name."""
    return {name: metadata.version(name) for name in ("torch", "opacus")}


def prepare(request: Request, surgery: Surgery) -> Prepared:
    """Scan, repair, observe, audit, choose. Leaves the repaired model, and nothing else, behind.

    Returns:
        The plan and the evidence for it. Where the loop's call of the model cannot be told, all but the repairs is left to
        :func:`decide`.
    """
    loss_trace.switch_off_all()
    outside = modules_outside(request.module, request.criterion, request.training_step)
    with undone_after(outside):
        return _prepare(request, surgery, outside)


def _prepare(request: Request, surgery: Surgery, outside: list[nn.Module]) -> Prepared:
    findings = _repair(request, surgery)
    with rng_untouched():
        size = math.ceil(batch_size(request.data_loader))
        samples = probe.take(request.data_loader, min(probe.SAMPLES, size), request.privacy.augmentation)
    waits = may_wait(request)
    try:
        step = infer(samples.batch, request.criterion, request.training_step, request.privacy.loss_reduction)
        return _proven(request, surgery, samples, step, findings, outside)
    except UnknownCallError as unknown:
        if not waits:
            raise
        check_validator(request, findings)
        plan, later = undecided(request), decided_later(request, unknown)
        proofs = ("the engine is decided on the first real step; this report is complete after it",)
        placeholder = Placeholder(samples.singles[0])
        return Prepared(plan, placeholder, None, (*findings, later), (), proofs, samples, tuple(findings))


def decide(request: Request, earlier: Prepared, others: Sequence[Way], call: Call) -> tuple[Prepared, Way] | None:
    """Observe, audit and choose on a real call of the model, before anything of its step has happened.

    Args:
        earlier: what the call of dpfix has found out.
        others: calls that the loop makes as well.
        call: a real call that was not looked at before.

    Returns:
        The plan and the evidence for it, and the reading of the call; ``None`` if a call after an empty draw does not tell,
        and the next one has to.
    """
    loss_trace.switch_off_all()
    outside = modules_outside(request.module, request.criterion, None)
    request = replace(request, handed_over=True)
    refused: list[DPFixError] = []
    with rng_untouched(), undone_after(outside):
        for way in learn(request.module, call, earlier.samples, request.privacy.loss_reduction):
            try:
                with Surgery(request.scan) as surgery:
                    check_fixed(request.module, way)
                    whole = together([*others, way])
                    made = _proven(request, surgery, whole.samples, whole.step, list(earlier.repairs), outside)
                    check_rows(request.module, earlier.known_rows, made.known_rows)
                    surgery.commit()
                return made, way
            except (LossError, CoupledModelError, NoEngineError, TrainingStepError) as error:
                refused.append(error)
    if refused:
        raise refused[0]
    return None


def _proven(
    request: Request,
    surgery: Surgery,
    samples: probe.Probe,
    step: TrainingStep,
    findings: list[Finding],
    outside: list[nn.Module],
) -> Prepared:
    subject = Subject(request.module, step)
    surgery.undo_with(remembered_lazy(subject.module))
    if _materialised(subject, samples):
        findings += [f for f in _repair(request, surgery) if f not in findings]
    check_validator(request, findings)
    repairs = tuple(findings)

    record = observe(subject, samples)
    check_inside(subject.module, record)
    check_outside(subject, samples, outside)
    if record.unused and record.together.used:
        for name in record.unused:
            surgery.freeze(subject.module.get_parameter(name))
        findings.append(frozen(subject.module, record))
    findings += kept_until_next_call(record)
    plan = _plan(request, samples, record, step)

    ordinary = Trial(samples, record, reference(record, record.unused, plan.share))
    plan = replace(plan, weighted_by_rows=weighted_by_rows(ordinary, plan))
    if request.performance.no_grad_regions:
        regions = no_grad_search.find(subject, samples, record, plan.frozen_parameters)
        plan = replace(plan, no_grad_regions=regions)
        findings += [no_grad_search.finding(region, len(samples)) for region in regions]
    proofs = check_isolation(subject, ordinary, plan, request.criterion)
    trials = Trials(ordinary, _provoke(request, subject, ordinary, plan))
    empty = _attempt(request, subject, partial(probe.emptied, samples), ordinary, plan)
    plan, evidence = _choose(request, subject, trials, plan)
    proofs += select.proofs(plan, evidence, trials)
    findings += _advice(request, subject, record)
    return Prepared(
        plan,
        _placeholder(empty or ordinary, plan),
        known_rows(samples, record),
        tuple(findings),
        evidence,
        tuple(proofs),
        samples,
        repairs,
        step if step.guessed else None,
    )


def _advice(request: Request, subject: Subject, record: StepRecord) -> list[Finding]:
    """What the probe and the loader showed and nothing has to be done about."""
    name = type(subject.module).__name__
    return [
        *(double_activation.finding(name, pair) for pair in record.together.repeated),
        *unknown_loss(subject.step),
        *constant_writes(record),
        *overwritten(record.in_place),
        *several_rows(name, record),
        *(replaced_sampler(request.data_loader) if request.privacy.poisson_sampling else ()),
    ]


def _materialised(subject: Subject, samples: probe.Probe) -> bool:
    module, step = subject.module, subject.step
    with described_failures(step):
        return materialise(module, lambda: step.run(module, samples.batch))


def refuse(found: Sequence[tuple[Rule, Finding]]) -> None:
    """Stop the call if a rule refuses."""
    refused = [(rule, finding) for rule, finding in found if finding.refused]
    if refused:
        raise refused[0][0].error([finding for _, finding in refused])


def _repair(request: Request, surgery: Surgery) -> list[Finding]:
    found = run_rules(request.scan, RULES)
    refuse(found)
    surgery.repair(found)
    return [finding for _, finding in found]


def _plan(request: Request, samples: probe.Probe, record: StepRecord, step: TrainingStep) -> Plan:
    return Plan(
        calls=record.calls,
        layers=record.layers,
        elsewhere=record.elsewhere,
        loss_reduction=request.privacy.loss_reduction,
        loss_known=step.loss_known,
        batch_first=request.performance.batch_first,
        frozen_parameters=record.unused if record.together.used else (),
        fixed_norms=tuple(path for path, _ in request.scan.modules(_BatchNorm)),
        scratch=record.scratch,
        views=request.views,
        row_counter=row_counter(request, samples, record.counts, step),
        help_vmap=record.needs_workarounds,
        handed_over=request.handed_over,
    )


_LARGER = 1e6
"""A sample whose gradient is so much larger than the others' (1e21 times in VNet) drowns them in any sum of floats."""


_SLACK = 5.0
"""How many times more rounding is allowed on the harder probes."""


def _provoke(request: Request, subject: Subject, ordinary: Trial, plan: Plan) -> tuple[Trial, ...]:
    """Harder probes, as far as the step takes them: the model and the loss are checked on each.

    Returns:
        Those on which an engine is to be checked too. A sample of zeros belongs to none of them: behind a normalisation
        its gradient is made of rounding errors, on which two right engines need not agree.
    """
    trials: list[Trial] = []
    for number, make in enumerate(probe.provoked(ordinary.samples)):
        if number == 1 and trials:
            break  # the first one has every provocation in it
        trial = _attempt(request, subject, make, ordinary, plan)
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


def _choose(request: Request, subject: Subject, trials: Trials, plan: Plan) -> tuple[Plan, tuple[EngineEvidence, ...]]:
    """The engine and the evidence for it; rank 0 times the engines, the other ranks audit the one that it chose."""
    size = batch_size(request.data_loader) / request.ranks.size
    choose = partial(select.choose, subject, trials, plan, request.performance, size)
    chosen = choose() if request.ranks.rank == 0 else None
    name = request.ranks.first(chosen[0].engine if chosen else "")
    return chosen or choose(chosen_by_rank_0=name)


def _attempt(
    request: Request, subject: Subject, make: Callable[[], probe.Probe], ordinary: Trial, plan: Plan
) -> Trial | None:
    """Check model and loss on a harder probe; ``None`` if the step cannot take it, or if it is the ordinary one."""
    try:
        changed = make()
        if None not in changed.unchanged:
            return None
        record = observe(subject, changed, ordinary.record)
        trial = Trial(changed, record, reference(record, plan.frozen_parameters, plan.share), _SLACK)
    except (TrainingStepError, CoupledModelError, *USER_CODE_ERRORS):
        return None  # no legal sample for this model: an index out of range, a division by zero
    if float(trial.wanted.norms.max()) > _LARGER * float(trial.wanted.norms.median()):
        return None
    check_inside(subject.module, record)
    try:
        check_isolation(subject, trial, plan, request.criterion)
    except (CoupledModelError, LossError):
        if decided_by_rounding(subject, changed, trial.wanted.tolerance):
            return None
        raise
    return trial


def warn_blocked(report: Report) -> None:
    """Warn about what blocks training and was neither repaired nor refused: nobody has to print a report."""
    for finding in report.findings:
        if finding.severity is Severity.BLOCKS_TRAINING and finding.fixability is Fixability.NOTHING:
            warn_user(str(finding))

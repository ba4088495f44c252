"""From the user's objects to a plan: scan, repair, observe, audit, choose."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from dpfix.audit.harder import Harder
from dpfix.audit.isolation import check_ordinary, weighted_by_rows
from dpfix.audit.persistent_state import check_inside, check_outside, modules_outside, undone_after
from dpfix.audit.reference import Trial, Trials, reference
from dpfix.choose import select
from dpfix.choose.physical import told_physical, with_physical
from dpfix.errors import CoupledModelError, DPFixError, LossError, NoEngineError, StateWrittenError, TrainingStepError
from dpfix.instrument.fixed_randomness import DRAWS
from dpfix.instrument.function_modes import switch_off_all, unfollowed
from dpfix.instrument.own_generators import drawing, own_generators
from dpfix.instrument.rng import rng_untouched
from dpfix.instrument.source import warn_user
from dpfix.observe import double_activation, no_grad_search, probe
from dpfix.observe.batch_statistics import mixing_modules
from dpfix.observe.call_sources import Call
from dpfix.observe.failures import described_failures
from dpfix.observe.real_call import Way, check_fixed, learn, together
from dpfix.observe.record import StepRecord, several_rows
from dpfix.observe.recorder import overwritten
from dpfix.observe.run import frozen, observe
from dpfix.observe.several_rows import check_rows, known_rows, row_counter, rows_averaged
from dpfix.observe.steady import steady
from dpfix.observe.training_step import Subject, TrainingStep, UnknownCallError, infer, unknown_loss
from dpfix.observe.undecided import decided_later, may_decide_again, may_wait, undecided
from dpfix.observe.writes import constant_writes, kept_until_next_call
from dpfix.plan import Plan
from dpfix.repair.lazy import materialise
from dpfix.repair.surgery import Surgery
from dpfix.repair.validator import check_validator
from dpfix.report.finding import Finding, Fixability, Severity
from dpfix.report.report import EngineEvidence, Layer, Proof, Report
from dpfix.report.versions import versions
from dpfix.rules import RULES, Rule
from dpfix.rules.batch_norm import fixed_norms
from dpfix.rules.rule import run_rules
from dpfix.sampling.collate import KnownRows, Placeholder
from dpfix.sampling.fingerprint import data_fingerprint
from dpfix.sampling.people import people_of
from dpfix.sampling.ranks import fingerprint
from dpfix.sampling.rate import batch_size, index_set, of_sampling
from dpfix.sampling.shown_people import people_shown
from dpfix.scan.clipping import scheme_of
from dpfix.scan.layers import before_of, layers, tree_of
from dpfix.scan.request import Request
from dpfix.scan.settings import settings
from dpfix.training.first_step import Decide, Decision
from dpfix.training.follow.collation import Collation
from dpfix.training.follow.delivery import BatchLayout


@dataclass(frozen=True)
class Prepared:
    """Everything that was found out before the hand-off.

    Attributes:
        plan: how the model is to be trained.
        placeholder: what an empty draw delivers.
        known_rows: what the loader has to see in every sample, if it has several rows.
        step: the training step, told or inferred; ``None`` if the first real call is to show it.
        batches: how the loader's batches carry their samples.
        findings: what was found.
        evidence: what was measured about the engines.
        proofs: what was shown.
        samples: the probe of the loader's dataset.
        repairs: those of the findings that rules have made.
        layers: every module before the repairs and after.
    """

    plan: Plan
    placeholder: Placeholder
    known_rows: KnownRows | None
    step: TrainingStep | None
    batches: BatchLayout
    findings: tuple[Finding, ...]
    evidence: tuple[EngineEvidence, ...]
    proofs: tuple[Proof, ...]
    samples: probe.Probe
    repairs: tuple[Finding, ...]
    layers: tuple[Layer, ...] = ()

    def report(self, request: Request, noise_multiplier: float | None, *, secure: bool = False) -> Report:
        """The report of a call; the noise is ``None`` in a diagnosis, ``secure`` says whether it is cryptographic."""
        return Report(
            type(request.module).__name__,
            self.findings,
            self.plan.engine,
            self.evidence,
            self.proofs,
            settings(request, noise_multiplier, self.plan, secure=secure),
            versions(),
            self.layers,
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


def prepare(request: Request, surgery: Surgery) -> Prepared:
    """Scan, repair, observe, audit, choose. Leaves the repaired model, and nothing else, behind.

    Returns:
        The plan and the evidence for it. Where the loop's call of the model cannot be told, all but the repairs is left to
        :func:`decide`.
    """
    switch_off_all()
    outside = modules_outside(request.module, request.criterion, request.training_step)
    own = own_generators(
        request.module, request.training_step if request.training_step is not None else request.criterion
    )
    before = tree_of(request.module)
    with undone_after(outside), drawing(own, DRAWS[0]):
        prepared = _prepare(request, surgery, outside)
    return replace(prepared, layers=layers(before, tree_of(request.module)))


def _prepare(request: Request, surgery: Surgery, outside: list[nn.Module]) -> Prepared:
    findings = _repair(request, surgery)
    with rng_untouched():
        size = math.ceil(batch_size(request.data_loader))
        samples = probe.take(request.data_loader, min(probe.SAMPLES, size), request.privacy.augmentation)
        findings += people_shown(request.data_loader, samples.items)
        batches = _batches(samples)
        samples = steady(samples)
    waits = may_wait(request)
    try:
        step = infer(samples.batch, request.criterion, request.training_step, request.privacy.loss_reduction)
        return replace(_proven(request, samples, step, findings, outside), batches=batches)
    except UnknownCallError as unknown:
        if not waits:
            raise
        check_validator(request, findings)
        plan = replace(undecided(request), physical=told_physical(request))
        later = decided_later(request, unknown)
        proofs = (Proof("", "the engine is decided on the first real step; this report is complete after it"),)
        placeholder = Placeholder(samples.singles[0])
        found, repairs = (*findings, later), tuple(findings)
        return Prepared(plan, placeholder, None, None, batches, found, (), proofs, samples, repairs)


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
    outside = modules_outside(request.module, request.criterion, None)
    own = own_generators(request.module, request.criterion)
    request = replace(request, handed_over=True)
    refused: list[DPFixError] = []
    with unfollowed(), rng_untouched(), undone_after(outside), drawing(own, DRAWS[0]):
        for way in learn(request.module, call, earlier.samples, request.privacy.loss_reduction):
            try:
                with Surgery(request.scan) as surgery:
                    check_fixed(request.module, way)
                    whole = together([*others, way])
                    made = _proven(request, whole.samples, whole.step, list(earlier.repairs), outside)
                    check_rows(request.module, earlier.known_rows, made.known_rows)
                    surgery.commit()
                now = layers(before_of(earlier.layers), tree_of(request.module))
                return replace(made, layers=now), way
            except (LossError, CoupledModelError, NoEngineError, TrainingStepError) as error:
                refused.append(error)
    if refused:
        raise refused[0]
    return None


def deciding(request: Request, prepared: Prepared, report_of: Callable[[Prepared], Report]) -> Decide | None:
    """What decides on a real call of the model that is none of those that were looked at, or that trains what they do not."""
    if not may_decide_again(request) or not (request.training_step is None or prepared.plan.frozen_parameters):
        return None
    guess, learnt, plans = prepared.step, list[Way](), [prepared.plan]

    def on(call: Call, confirmed: bool) -> Decision | None:
        guessed = [Way(guess, prepared.samples)] if guess is not None and confirmed and not learnt else []
        so_far = plans[-1] if confirmed and plans[-1].engine else None
        found = decide(replace(request, so_far=so_far), prepared, [*guessed, *learnt], call)
        if found is None:
            return None
        made, way = found
        plans.append(made.plan)
        learnt.extend([*guessed, way])
        decision = Decision(made.plan, report_of(made))
        warn_blocked(decision.report)
        return decision

    return on


def _proven(
    request: Request, samples: probe.Probe, step: TrainingStep, findings: list[Finding], outside: list[nn.Module]
) -> Prepared:
    """As :func:`_audited`, all or nothing; where calls of ``batch_norm`` mix the samples, they are repaired first."""

    def attempt(request: Request) -> Prepared:
        with Surgery(request.scan) as surgery:
            prepared = _audited(request, surgery, samples, step, list(findings), outside)
            surgery.commit()
        return prepared

    try:
        return attempt(request)
    except (CoupledModelError, StateWrittenError):
        mixing = mixing_modules(Subject(request.module, step), samples, request.privacy.norm)
        if not mixing:
            raise
    return attempt(replace(request, mixing=mixing))


def _audited(
    request: Request,
    surgery: Surgery,
    samples: probe.Probe,
    step: TrainingStep,
    findings: list[Finding],
    outside: list[nn.Module],
) -> Prepared:
    subject = Subject(request.module, step)
    if _materialised(subject, samples) or request.mixing:
        findings += [f for f in _repair(request, surgery) if f not in findings]
    check_validator(request, findings)
    repairs = tuple(findings)

    record = observe(subject, samples)
    if request.so_far is not None and record.together.used:
        record = record.beside(request.so_far)
    check_inside(subject.module, record)
    check_outside(subject, samples, outside)
    if record.unused and record.together.used:
        for name in record.unused:
            surgery.freeze(subject.module.get_parameter(name))
        findings.append(frozen(subject.module, record))
    findings += kept_until_next_call(record)
    plan = _plan(request, samples, record, step)

    ordinary = Trial(samples, record, reference(record, record.unused, plan.share(record.counts)))
    plan = replace(plan, weighted_by_rows=weighted_by_rows(ordinary, plan))
    if request.performance.no_grad_regions:
        regions = no_grad_search.find(subject, samples, record, plan.frozen_parameters)
        plan = replace(plan, no_grad_regions=regions)
        findings += [no_grad_search.finding(region, len(samples)) for region in regions]
    isolated = check_ordinary(subject, ordinary, plan, request.criterion)
    proofs, harder = isolated.proofs, Harder(subject, ordinary, plan, request.criterion)
    trials = Trials(ordinary, harder.provoked(isolated.inputs))
    placeholder = _placeholder(harder.emptied() or ordinary, plan)
    proofs += harder.drawn_otherwise()
    plan, evidence = _choose(request, subject, trials, plan)
    plan = with_physical(request, subject, samples, plan)
    proofs += select.proofs(plan, evidence, trials)
    findings += _advice(request, subject, record)
    return Prepared(
        plan,
        placeholder,
        known_rows(samples, record),
        step,
        BatchLayout(),
        tuple(findings),
        evidence,
        tuple(proofs),
        samples,
        repairs,
    )


def _batches(samples: probe.Probe) -> BatchLayout:
    layout = BatchLayout.of(samples)
    collation = Collation(layout)
    collation.look_at_order(samples.collate, samples.items)
    collation.look(samples.collate, samples.items)
    return layout


def _advice(request: Request, subject: Subject, record: StepRecord) -> list[Finding]:
    """What the probe and the loader showed and nothing has to be done about."""
    name = type(subject.module).__name__
    return [
        *(double_activation.finding(name, pair) for pair in record.together.repeated),
        *unknown_loss(subject.step),
        *constant_writes(record),
        *overwritten(record.in_place),
        *several_rows(name, record),
        *of_sampling(request.data_loader, request.privacy.sampling),
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
    unused = record.unused if record.together.used else ()
    return Plan(
        calls=record.calls,
        layers=record.layers,
        elsewhere=record.elsewhere,
        loss_reduction=request.privacy.loss_reduction,
        loss_known=step.loss_known,
        batch_first=request.performance.batch_first,
        frozen_parameters=unused,
        fixed_norms=fixed_norms(request.scan),
        scratch=record.scratch,
        views=rows_averaged(request, samples, record.counts),
        per_person=people_of(request.data_loader) is not None,
        row_counter=row_counter(request, samples, record.counts, step),
        help_vmap=record.needs_workarounds,
        own_engines=request.handed_over
        or (step.guessed and may_wait(request))
        or bool(unused and may_decide_again(request)),  # they are trained once gradient reaches them
        clipping=scheme_of(request, unused),
    )


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


def warn_blocked(report: Report) -> None:
    """Warn about what blocks training and was neither repaired nor refused: nobody has to print a report."""
    for finding in report.findings:
        if finding.severity is Severity.BLOCKS_TRAINING and finding.fixability is Fixability.NOTHING:
            warn_user(str(finding))

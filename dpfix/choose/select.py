"""Choosing the engine: those that pass the audit are timed, and the fastest is kept; batches of one where none passes."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import nn

from dpfix.audit.clipped_sum import SLACK, Reference, check_engine
from dpfix.choose import plan_cache, timing
from dpfix.engines import BY_NAME, ENGINES, Engine
from dpfix.errors import NoEngineError
from dpfix.instrument.source import describe_module
from dpfix.observe.probe import SCALED, Probe
from dpfix.observe.record import StepRecord
from dpfix.observe.training_step import TrainingStep
from dpfix.plan import Plan
from dpfix.report.report import EngineEvidence
from dpfix.scan.options import Options

TIMED_SAMPLES = 32
"""Batch size at which engines are timed, at most; smaller if the script's batches are."""
BUDGET_SECONDS = 3.0
"""Once an engine has passed, further ones are tried for this long."""

_SLACK = 5.0
"""How many times more rounding is allowed on the harder probes."""

_NOT_TRIED = "not tried"


def engines_for(mode: str) -> tuple[Engine, ...]:
    """The engines to try.

    Args:
        mode: ``grad_sample_mode`` of the call.

    Returns:
        All of them for ``"auto"``, the named one otherwise.
    """
    if mode == "auto":
        return tuple(ENGINES.values())
    return (BY_NAME[mode],)


@dataclass(frozen=True)
class Trial:
    """A probe, what one step on it showed, and its batch-of-one reference.

    Attributes:
        samples: the probe.
        record: what the step showed.
        wanted: the reference.
    """

    samples: Probe
    record: StepRecord
    wanted: Reference


def choose(
    module: nn.Module,
    step: TrainingStep,
    ordinary: Trial,
    harder: Sequence[Trial],
    plan: Plan,
    options: Options,
    batch_size: float,
    chosen_by_rank_0: str = "",
) -> tuple[Plan, tuple[EngineEvidence, ...]]:
    """Audit the candidates, time those that pass, keep the fastest that also passes on the harder probes.

    Args:
        module: the repaired model.
        step: from batch to loss.
        ordinary: the probe.
        harder: probes with an empty sample, a rare label, an outlier.
        plan: everything about the training but the engine.
        options: ``grad_sample_mode`` of the call; whether to remember the order of the engines, and to use what is
            remembered.
        batch_size: the script's batch size.
        chosen_by_rank_0: the only candidate, on the other ranks.

    Returns:
        The plan with its engine, and the evidence for every candidate.

    Raises:
        NoEngineError: no candidate reproduced the reference.
    """
    mode = chosen_by_rank_0 or options.grad_sample_mode
    if mode != "auto" and not BY_NAME[mode].audited:
        reason = "asked for by name; what the script computes itself is not audited"
        return plan.with_engine(BY_NAME[mode]), (EngineEvidence(mode, passed=False, reason=reason),)
    with _quiet():
        return _choose(module, step, ordinary, harder, plan, mode, options, batch_size)


def _choose(
    module: nn.Module,
    step: TrainingStep,
    ordinary: Trial,
    harder: Sequence[Trial],
    plan: Plan,
    mode: str,
    options: Options,
    batch_size: float,
) -> tuple[Plan, tuple[EngineEvidence, ...]]:
    """The best of the engines; one of last resort only where no other stands the audit and the harder probes."""
    candidates = engines_for(mode)
    evidence: dict[str, EngineEvidence] = {}
    for resort in (False, True):
        engines = [e for e in candidates if e.last_resort is resort]
        chosen = _best(engines, evidence, module, step, ordinary, harder, plan, options, batch_size)
        if chosen is not None:
            why = f"{_NOT_TRIED}, it is the last resort and `{chosen.engine}` is right"
            left = {e.name: EngineEvidence(e.name, passed=False, reason=why) for e in candidates}
            return chosen, tuple((left | evidence).values())
    raise NoEngineError(_nothing_passed(module, mode, options, tuple(evidence.values())))


def _best(
    candidates: Sequence[Engine],
    evidence: dict[str, EngineEvidence],
    module: nn.Module,
    step: TrainingStep,
    ordinary: Trial,
    harder: Sequence[Trial],
    plan: Plan,
    options: Options,
    batch_size: float,
) -> Plan | None:
    """The plan with the fastest of some engines that stands the audit and the harder probes; writes their evidence."""
    size = max(2, min(TIMED_SAMPLES, int(batch_size)))
    batch = ordinary.samples.of_size(size)
    regions = [(r.site, r.of) for r in plan.no_grad_regions]
    settings = {"candidates": [e.name for e in candidates], "size": batch_size, "regions": regions}
    key = plan_cache.key(module, batch, plan=replace(plan, no_grad_regions=()), **settings)
    known = plan_cache.remembered(key) if options.cache and len(candidates) > 1 else None
    if known is not None and next(iter(known)) in {e.name for e in candidates}:
        best = next(iter(known))
        why = f"{_NOT_TRIED}, `{best}` was faster when this model was timed before"
        evidence |= {e.name: EngineEvidence(e.name, passed=False, reason=why) for e in candidates}
        evidence |= _try((BY_NAME[best],), module, step, ordinary, plan)
    else:
        evidence |= _try(candidates, module, step, ordinary, plan)
    passed = [e for e in candidates if evidence[e.name].passed]
    if len(passed) > 1:
        seconds = timing.in_order(passed, module, step, ordinary.samples, size, plan, batch_size)
        evidence |= {n: replace(evidence[n], seconds=s) for n, s in seconds.items()}
        passed = [BY_NAME[n] for n in seconds]
        if options.cache:
            plan_cache.remember(key, seconds)
    untried = [e for e in candidates if evidence[e.name].reason.startswith(_NOT_TRIED)]
    for engine in (*passed, *untried):
        if engine in untried:  # those that passed first did not stand the harder probes
            evidence |= _try((engine,), module, step, ordinary, plan)
            if not evidence[engine.name].passed:
                continue
        chosen = plan.with_engine(engine)
        trials = _confirm(engine, module, step, ordinary, harder, chosen, options)
        problem = next((e for e in trials if not e.passed), None)
        if problem is None:
            return chosen
        evidence[engine.name] = problem
    return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Engines that are only being tried must not warn the user about layers they may never train."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _try(
    engines: Sequence[Engine], module: nn.Module, step: TrainingStep, trial: Trial, plan: Plan
) -> dict[str, EngineEvidence]:
    evidence: dict[str, EngineEvidence] = {}
    start = time.perf_counter()
    for engine in engines:
        if any(e.passed for e in evidence.values()) and time.perf_counter() - start > BUDGET_SECONDS:
            reason = f"{_NOT_TRIED}, {BUDGET_SECONDS:.0f} s were spent on engines that passed"
            evidence[engine.name] = EngineEvidence(engine.name, passed=False, reason=reason)
            continue
        verdict = engine.supports(module, trial.record)
        this = plan.with_engine(engine)
        evidence[engine.name] = (
            check_engine(engine, module, step, trial.samples, this, trial.wanted, trial.wanted.clip_norms)
            if verdict
            else EngineEvidence(engine.name, passed=False, reason=verdict.reason)
        )
    return evidence


def _confirm(
    engine: Engine,
    module: nn.Module,
    step: TrainingStep,
    ordinary: Trial,
    harder: Sequence[Trial],
    plan: Plan,
    options: Options,
) -> Iterator[EngineEvidence]:
    """The harder probes, and on the last of them (an outlier is in it, where there is one) the bound.

    At the clip norm that clips every sample: there an outlier does not drown the others. Rounding is larger than on the
    ordinary probe, while what goes wrong with the data of one sample is as large as its gradient.
    """
    trials = [*harder] or [ordinary]
    if (
        plan.no_grad_regions and options.grad_sample_mode == "auto"
    ):  # a region that is given up while training must leave an engine that is right
        without = replace(plan, no_grad_regions=())
        yield check_engine(engine, module, step, ordinary.samples, without, ordinary.wanted, ordinary.wanted.clip_norms)
    for trial in trials:
        left_out = min(SCALED, len(trial.samples) - 1) if trial is trials[-1] else None
        clip_norms = trial.wanted.clip_norms[:1]
        slack = _SLACK if harder else 1.0
        yield check_engine(engine, module, step, trial.samples, plan, trial.wanted, clip_norms, left_out, slack=slack)


def proofs(plan: Plan, evidence: tuple[EngineEvidence, ...], ordinary: Trial, harder: Sequence[Trial]) -> list[str]:
    """What was shown about the chosen engine, for the report.

    Args:
        plan: the plan.
        evidence: what was measured.
        ordinary: the probe.
        harder: the harder probes that the step could take.

    Returns:
        One line per proof.
    """
    chosen = next(e for e in evidence if e.engine == plan.engine)
    if chosen.max_error is None:
        return ["exact: not shown, the script computes per-sample gradients itself"]
    lines = [
        f"exact: the clipped sum of {len(ordinary.samples)} samples equals the batch-of-one reference at 3 clip norms, "
        f"largest relative error {chosen.max_error:.1e} (allowed {ordinary.wanted.tolerance:.0e})",
        f"bounded: leaving a sample out moves the clipped sum by at most {1 + SLACK:g} times the clip norm",
    ]
    if harder:
        lines.append(f"the same on {len(harder)} harder probe(s): an empty mask, a rare label, a sample scaled by 50")
    return lines


def _nothing_passed(module: nn.Module, mode: str, options: Options, evidence: Sequence[EngineEvidence]) -> str:
    lines = "\n".join(f"        {e.engine}: {e.reason}" for e in evidence)
    asked = "" if mode == "auto" else f" (grad_sample_mode='{mode}' was asked for)"
    if mode != options.grad_sample_mode:
        asked = f" (rank 0 chose {mode!r}, and all ranks train with one engine)"
    help = (
        "check that training_step makes the calls your loop makes, through the model itself, and that no penalty on "
        "weights is part of the loss (use weight_decay)."
        if options.grad_sample_mode == "auto"
        else "leave grad_sample_mode at 'auto'."
    )
    return (
        f"DPF016 [breaks-guarantee] no engine reproduces the batch-of-one reference for {describe_module(module, '')}{asked}.\n"
        f"  why:\n{lines}\n"
        f"  help: {help}"
    )

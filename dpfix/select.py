"""Choosing the engine: those that pass the audit are timed, and the fastest is kept."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from dpfix.audit import Reference, check_engine
from dpfix.engines import BY_HAND, ENGINES, Engine
from dpfix.errors import NoEngineError
from dpfix.findings import EngineEvidence
from dpfix.observe import StepRecord
from dpfix.plan import Plan
from dpfix.probe import Probe
from dpfix.scan import place
from dpfix.traceless import state_of, traceless
from dpfix.training_step import TrainingStep

TIMED_SAMPLES = 16
"""Batch size at which engines are timed, at most; smaller if the script's batches are."""
ROUNDS = 3
BUDGET_SECONDS = 10.0
"""Once an engine has passed, further ones are tried and timed for this long."""


def engines_for(mode: str) -> tuple[Engine, ...]:
    """The engines to try.

    Args:
        mode: ``grad_sample_mode`` of the call.

    Returns:
        All of them for ``"auto"``, the named one otherwise.
    """
    if mode == "auto":
        return tuple(ENGINES.values())
    return (BY_HAND,) if mode == BY_HAND.name else (ENGINES[mode],)


def choose(
    module: nn.Module,
    step: TrainingStep,
    probe: Probe,
    record: StepRecord,
    plan: Plan,
    wanted: Reference,
    mode: str,
    batch_size: float,
) -> tuple[Plan, tuple[EngineEvidence, ...]]:
    """Audit the candidates, time those that pass, keep the fastest.

    Args:
        module: the repaired model.
        step: from batch to loss.
        probe: the samples.
        record: what the probe showed.
        plan: everything about the training but the engine.
        wanted: the batch-of-one reference.
        mode: ``grad_sample_mode`` of the call.
        batch_size: the script's batch size.

    Returns:
        The plan with its engine, and the evidence for every candidate.

    Raises:
        NoEngineError: no candidate reproduced the reference.
    """
    if mode == BY_HAND.name:
        reason = "asked for by name; what the script computes itself is not audited"
        return replace(plan, engine=mode, opacus_mode=mode), (EngineEvidence(mode, passed=False, reason=reason),)
    evidence: dict[str, EngineEvidence] = {}
    start = time.perf_counter()
    for engine in engines_for(mode):
        if any(e.passed for e in evidence.values()) and time.perf_counter() - start > BUDGET_SECONDS:
            reason = f"not tried, {BUDGET_SECONDS:.0f} s were spent on engines that passed"
            evidence[engine.name] = EngineEvidence(engine.name, passed=False, reason=reason)
            continue
        verdict = engine.supports(module, record)
        trial = replace(plan, engine=engine.name, opacus_mode=engine.opacus_mode)
        evidence[engine.name] = (
            check_engine(engine, module, step, probe, trial, wanted)
            if verdict
            else EngineEvidence(engine.name, passed=False, reason=verdict.reason)
        )
    passed = [ENGINES[name] for name, e in evidence.items() if e.passed]
    if not passed:
        raise NoEngineError(_nothing_passed(module, mode, tuple(evidence.values())))
    if len(passed) > 1:
        seconds = _time(passed, module, step, probe.of_size(max(2, min(TIMED_SAMPLES, int(batch_size)))), plan)
        evidence = {n: replace(e, seconds=seconds.get(n)) for n, e in evidence.items()}
        passed.sort(key=lambda engine: seconds[engine.name])
    best = passed[0]
    return replace(plan, engine=best.name, opacus_mode=best.opacus_mode), tuple(evidence.values())


def _time(
    engines: Sequence[Engine], module: nn.Module, step: TrainingStep, batch: object, plan: Plan
) -> dict[str, float]:
    """Median seconds of a forward and backward pass, the engines taking turns."""
    seen: dict[str, list[float]] = {engine.name: [] for engine in engines}
    parameters = [p for p in module.parameters() if p.requires_grad]
    before = state_of(module)
    begin = time.perf_counter()
    for turn in range(ROUNDS):
        if turn and time.perf_counter() - begin > BUDGET_SECONDS:
            break
        for engine in engines:
            times = seen[engine.name]
            with traceless(module, before):
                handle = engine.attach(module, replace(plan, engine=engine.name, opacus_mode=engine.opacus_mode))
                try:
                    start = time.perf_counter()
                    step.loss(handle.model, batch).backward()
                    handle.collect(parameters)
                    times.append(time.perf_counter() - start)
                finally:
                    handle.detach()
    return {name: statistics.median(times) for name, times in seen.items()}


def _nothing_passed(module: nn.Module, mode: str, evidence: Sequence[EngineEvidence]) -> str:
    lines = "\n".join(f"        {e.engine}: {e.reason}" for e in evidence)
    asked = "" if mode == "auto" else f" (grad_sample_mode='{mode}' was asked for)"
    help = (
        "check that training_step makes the calls your loop makes, through the model itself, and that no penalty on "
        "weights is part of the loss (use weight_decay)."
        if mode == "auto"
        else "leave grad_sample_mode at 'auto'."
    )
    return (
        f"DPF016 [breaks-guarantee] no engine reproduces the batch-of-one reference for {place(module, '')}{asked}.\n"
        f"  why:\n{lines}\n"
        f"  help: {help}"
    )

"""Timing the engines that passed the audit on a probe batch, in turns."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress

from dpfix.audit.released import clipped_sums
from dpfix.engines.base import Engine, drop_sample_gradients
from dpfix.engines.no_grad_regions import applied
from dpfix.errors import USER_CODE_ERRORS, DPFixError
from dpfix.instrument.clock import clock_for
from dpfix.instrument.held_memory import HeldMemory
from dpfix.instrument.module_state import state_of, traceless
from dpfix.observe.probe import Probe
from dpfix.observe.training_step import Subject
from dpfix.plan import Plan

TIMED_SAMPLES = 32
"""Batch size at which engines are timed, at most; smaller if the script's batches are."""
ROUNDS = 20
"""An engine that was slower than the fastest by one part in two after two rounds, in three after three, is out of the race."""
IN_A_ROW = 2
"""Steps of an engine in its turn: the first one finds memory as another engine has left it."""
ENOUGH_SECONDS = 0.3
"""No further round is begun after this long."""
NOTICEABLE = 1.05
"""An engine that keeps per-sample gradients has to be this much faster than one that does not."""


def timed_size(batch_size: float) -> int:
    """The number of samples in the batches that engines are timed on, for a script's batch size."""
    return max(2, min(TIMED_SAMPLES, int(batch_size)))


def in_order(
    engines: Sequence[Engine], subject: Subject, probe: Probe, plan: Plan, batch_size: float
) -> dict[str, float]:
    """The engines from best to worst, by the fastest of several steps: what is slower was disturbed by something else.

    Args:
        engines: those that passed the audit.
        probe: the samples of which batches are made.
        plan: everything about the training but the engine.

    Returns:
        Seconds of a step by name.
    """
    found = _time(engines, subject, probe, plan, timed_size(batch_size))
    lean = {e.name for e in engines if not e.materialises}
    return {n: found[n] for n in sorted(found, key=lambda n: found[n] * (1 if n in lean else NOTICEABLE))}


def _time(engines: Sequence[Engine], subject: Subject, probe: Probe, plan: Plan, samples: int) -> dict[str, float]:
    seen: dict[str, list[float]] = {engine.name: [] for engine in engines}
    batch, counts = probe.of_size(samples), probe.counts(plan.row_counter, samples)
    before = state_of(subject.module)
    begin = time.perf_counter()
    for turn in range(ROUNDS):
        if turn and time.perf_counter() - begin > ENOUGH_SECONDS:
            break
        if turn > 1:
            close = (1 + 1 / turn) * min(map(min, seen.values()))
            engines = [engine for engine in engines if min(seen[engine.name]) < close]
            if len(engines) == 1:
                break
        for engine in engines:
            with traceless(subject.module, before):
                seen[engine.name] += [_seconds(engine, subject, batch, counts, plan) for _ in range(IN_A_ROW)]
    return {name: min(times) for name, times in seen.items()}


def held(engine: Engine, subject: Subject, probe: Probe, plan: Plan, samples: int) -> int | None:
    """What the tensors of a step hold at once, beside the model.

    Args:
        probe: the samples of which batches are made.
        plan: everything about the training but the engine.
        samples: number of samples in the batch.

    Returns:
        Bytes; ``None`` if the engine does not run under observation.
    """
    batch, counts, before = probe.of_size(samples), probe.counts(plan.row_counter, samples), state_of(subject.module)
    watch = HeldMemory()
    with suppress(DPFixError, *USER_CODE_ERRORS), traceless(subject.module, before), watch:
        _seconds(engine, subject, batch, counts, plan)
        return watch.most
    return None


def _seconds(engine: Engine, subject: Subject, batch: object, counts: tuple[int, ...], plan: Plan) -> float:
    """One step up to the clipped sum."""
    module, parameters = subject.module, subject.trained()
    handle = engine.attach(module, plan.with_engine(engine))
    handle.counts = lambda: counts
    clock = clock_for(next(iter(parameters.values())).device)
    try:
        with applied(module, plan.no_grad_regions):
            start = clock()
            subject.step.loss(handle.model, batch).backward()
        handle.announce(list(parameters.values()))
        clipped_sums(handle, parameters, (1.0,), plan)
        return clock() - start
    finally:
        handle.detach()
        drop_sample_gradients(parameters.values())

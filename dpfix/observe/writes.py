"""State of the model that the step writes: the same for all samples, or kept until the next call, or neither."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from dpfix.errors import TrainingStepError
from dpfix.instrument.gradients import unchanged
from dpfix.instrument.module_state import Key, put_back, same
from dpfix.observe.one_step import run_step
from dpfix.observe.probe import Probe
from dpfix.observe.record import Run, StepRecord
from dpfix.observe.training_step import Subject
from dpfix.report.finding import Finding, Fixability, Severity


def constant_and_dependent(runs: Iterable[Run]) -> tuple[list[Key], list[Key]]:
    """What the runs wrote, apart: independent of the samples, and dependent on them."""
    runs = list(runs)
    constant, dependent = [], []
    for key in dict.fromkeys(key for run in runs for key in run.written):
        values = [run.written.get(key) for run in runs if key in run.written]
        everywhere = len(values) == len(runs) and all(same(values[0], v) for v in values)
        counter = all(isinstance(v, (bool, int, str)) for v in values)
        (constant if everywhere or counter else dependent).append(key)
    return constant, dependent


def overwritten_by_every_step(
    subject: Subject, probe: Probe, before: dict[Key, Any], first: Run, dependent: Sequence[Key]
) -> tuple[Key, ...]:
    """Attributes that hold nothing of an earlier step: after another sample, the step ends as it does from the start.

    Returns:
        Those of ``dependent`` for which that is so.
    """
    modules = dict(subject.module.named_modules())
    attributes = [
        (path, name)
        for path, name in dependent
        if name not in modules[path]._buffers and name not in modules[path]._parameters
    ]
    if not attributes:
        return ()
    try:
        run_step(subject, probe.singles[-1], before)
        again = run_step(subject, probe.singles[0], before)
    except TrainingStepError:
        return ()  # what the first step left behind breaks the second
    finally:
        put_back(subject.module, before)
    if not unchanged(again.gradients, first.gradients):
        return ()
    return tuple(key for key in attributes if key in again.written and same(again.written[key], first.written.get(key)))


def dotted(key: Key) -> str:
    """The name of a piece of state, with the path of its module."""
    return ".".join(part for part in key if part)


def constant_writes(record: StepRecord) -> list[Finding]:
    """Advice about state that the step writes in the same way for all samples, if there is any."""
    if not record.constant_writes:
        return []
    return [
        Finding.advice(
            "DPF021",
            f"forward writes `{record.constant_writes[0]}` ({len(record.constant_writes)} piece(s) of state).",
            "what is written was the same for different samples, so nothing leaks.",
            path=record.constant_writes[0],
        )
    ]


def kept_until_next_call(record: StepRecord) -> list[Finding]:
    """The finding about attributes that hold something of the last batch, if there are any."""
    if not record.scratch:
        return []
    name = dotted(record.scratch[0])
    return [
        Finding(
            "DPF025",
            Severity.BREAKS_GUARANTEE,
            Fixability.EXACT,
            f"forward keeps `{name}` until its next call ({len(record.scratch)} such attribute(s)).",
            "something of the last batch would leave the training, without noise, with the model object.",
            "put back to what it was before the call after every step; every forward pass sets it anew",
            "return what the loop needs from forward instead.",
            name,
        )
    ]

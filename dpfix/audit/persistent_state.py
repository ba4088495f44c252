"""State that the training step keeps between steps, in the model or outside of it: a centre of DINO, a queue, a mean."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dpfix.audit.loss_causes import referenced
from dpfix.errors import StateWrittenError
from dpfix.instrument.fixed_randomness import FixedRandomness
from dpfix.instrument.module_state import Key, put_back, same, state_of, traceless, written
from dpfix.instrument.source import describe_module
from dpfix.observe.probe import Probe
from dpfix.observe.record import StepRecord
from dpfix.observe.training_step import Subject
from dpfix.report.finding import Finding

_SAME = 1e-6
"""Relative change of a loss that is rounding."""

States = list[tuple[nn.Module, dict[Key, Any]]]


def check_inside(module: nn.Module, record: StepRecord) -> None:
    """Refuse a model whose forward pass keeps something of the samples.

    Raises:
        StateWrittenError: state that depends on the samples was written.
    """
    if not record.sample_writes:
        return
    name = record.sample_writes[0]
    where = describe_module(module, name.rpartition(".")[0])
    raise StateWrittenError(
        Finding.refusal(
            "DPF012",
            f"forward writes `{name}` ({where}), and what is written depends on the samples ({len(record.sample_writes)} such "
            "piece(s) of state).",
            "a running average, a codebook, a cache or an initialisation from the first batch leaves the training without noise.",
            "compute it outside the private training on public data and keep it fixed, make it a trainable parameter, or do "
            "not keep it between batches.",
            path=name,
        )
    )


def modules_outside(model: nn.Module, criterion: Any, training_step: Any) -> list[nn.Module]:
    """Modules that the loss consists of, and others that the training step refers to: all but the model's.

    Returns:
        Each once.
    """
    inside = set(model.modules())
    return list(dict.fromkeys(part for root in referenced(criterion, training_step) for part in _apart(root, inside)))


def _apart(root: nn.Module, inside: set[nn.Module]) -> Iterator[nn.Module]:
    """A module, or those of its parts that have nothing of the model in them."""
    if root in inside:
        return
    if inside.isdisjoint(root.modules()):
        yield root
        return
    for child in root.children():
        yield from _apart(child, inside)


@contextmanager
def undone_after(modules: Iterable[nn.Module]) -> Iterator[None]:
    """What a few probe steps write into these modules is undone.

    Yields:
        Nothing.
    """
    before = [(m, state_of(m)) for m in modules]
    try:
        yield
    finally:
        _put_back(before)


def check_outside(subject: Subject, probe: Probe, modules: Sequence[nn.Module]) -> None:
    """Refuse a training step that keeps something of the samples for later steps.

    A buffer that depends on the samples is kept by intention. An attribute may be a note of what was computed; it counts
    if another sample's note changes the loss.

    Raises:
        StateWrittenError: state that depends on the samples was written.
    """
    before = [(m, state_of(m)) for m in modules]
    first, other = probe.singles[0], probe.singles[-1]
    with traceless(subject.module), FixedRandomness():
        alone = _loss(subject, first)
        ones = [written(m, state) for m, state in before]
        if not any(ones):
            return
        _put_back(before)
        _loss(subject, other)
        others = [written(m, state) for m, state in before]
        moved = not abs(_loss(subject, first) - alone) <= _SAME * max(abs(alone), _SAME)
        _put_back(before)
    for m, one, another in zip(modules, ones, others, strict=True):
        for path, name in one.keys() | another.keys():
            dependent = not same(one.get((path, name)), another.get((path, name)))
            owner = m.get_submodule(path)
            if dependent and (moved or name in owner._buffers):
                raise StateWrittenError(_written_outside(owner, name))


def _loss(subject: Subject, batch: Any) -> float:
    with torch.enable_grad():
        return float(subject.loss(batch).detach())


def _put_back(states: States) -> None:
    for module, state in states:
        put_back(module, state)


def _written_outside(owner: nn.Module, name: str) -> Finding:
    return Finding.refusal(
        "DPF012",
        f"the training step writes `{name}` of {type(owner).__name__}, which is no part of the model, and what is written "
        "depends on the samples.",
        "a centre, a queue or a running average of the batch changes later steps, and leaves the training without noise.",
        "keep it fixed (computed from public data), or use a loss without it; what is only a log can be kept outside of "
        "the module.",
        path=name,
    )

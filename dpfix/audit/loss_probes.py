"""Does the loss couple the samples on other labels than the probe happens to have?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dpfix.audit.loss_replay import Gradients, OtherCallError, Replay, replay_of
from dpfix.audit.reference import Trial
from dpfix.errors import USER_CODE_ERRORS, DPFixError
from dpfix.instrument import pytree
from dpfix.instrument.module_state import traceless
from dpfix.observe.held import Number
from dpfix.observe.one_step import draws_for_each
from dpfix.observe.probe import Probe
from dpfix.observe.provoke import Change, fillings, fills, partly
from dpfix.observe.training_step import Subject
from dpfix.plan import Plan

_IN_DOUBLE = 1e-6
_IN_SINGLE = 1e-2
"""Relative error of the gradient of an output that is rounding, by precision."""

_FAILS = (OtherCallError, DPFixError, *USER_CODE_ERRORS)


@dataclass(frozen=True)
class Coupling:
    """A loss that couples the samples.

    Attributes:
        error: how much the gradient of a sample's output changes in the batch, relative to the largest one.
        when: on which labels, in words; empty for those of the probe.
    """

    error: float
    when: str = ""


@dataclass(frozen=True)
class LossProbes:
    """What was found out about a loss on the recorded outputs of the model.

    Attributes:
        coupling: the first coupling that was met.
        tried: how many sets of labels were tried.
        inputs: places in a sample that the model sees, or that may be such.
    """

    coupling: Coupling | None = None
    tried: int = 0
    inputs: tuple[pytree.Path, ...] = field(default=())


def try_losses(subject: Subject, trial: Trial, plan: Plan, telling: Sequence[Number]) -> LossProbes:
    """Compare the loss of a batch with that of its samples alone, on many labels.

    Only labels that the samples hold are tried, and those that mean something to the loss.

    Args:
        telling: the latter.

    Returns:
        What was found.
    """
    probe, record = trial.samples, trial.record
    every = tuple(path for path, _ in pytree.leaves(probe.items[0]) if fillings(probe, path))
    made = replay_of(subject, trial) if subject.step.loss_known else None
    if made is None or draws_for_each(record.alone[0], record.together):
        return LossProbes(inputs=every)
    weight = plan.weight(len(probe), record.counts)
    weights: list[float] = weight.tolist() if isinstance(weight, torch.Tensor) else [weight] * len(probe)
    with traceless(subject.module):
        for replay in (made, Replay(subject, made.together, made.alone, made.rows, double=False)):
            comparison = _Comparison(replay, probe, weights)
            try:
                coupling = comparison.of(probe)
            except _FAILS:
                continue
            inputs = tuple(path for path in every if _is_seen(replay, probe, path, telling))
            if coupling is not None:
                return LossProbes(coupling, 1, inputs)
            changes = list(fills(probe, [path for path in every if path not in inputs], telling))
            for number, change in enumerate(changes):
                coupling = comparison.of_changed(change)
                if coupling is not None:
                    return LossProbes(coupling, 2 + number, inputs)
            return LossProbes(None, 1 + len(changes), inputs)
    return LossProbes(inputs=every)


def _is_seen(replay: Replay, probe: Probe, path: pytree.Path, telling: Sequence[Number]) -> bool:
    """Whether the model sees what stands at a place of a sample."""
    for value in fillings(probe, path, telling):
        changed = pytree.map_at(lambda leaf, value=value: partly(leaf, value, 0.25), probe.items[0], [path])
        try:
            if replay.sees(probe.collate([changed]), replay.alone[0]):
                return True
        except USER_CODE_ERRORS:
            return True
    return False


@dataclass(frozen=True)
class _Alone:
    """Gradients of the loss of a sample alone.

    Attributes:
        gradients: one per floating output of the model.
        largest: the largest size of a number in each; no finite number if one in it is none.
    """

    gradients: Gradients
    largest: tuple[float, ...]

    @property
    def finite(self) -> bool:
        """Whether all numbers are; a loss that is not finite for a sample alone says nothing about the others."""
        return all(map(math.isfinite, self.largest))


@dataclass
class _Comparison:
    """The loss of a batch against that of its samples alone, on recorded outputs.

    The outputs of a language model are larger than its parameters: what is asked of their gradients is asked once, and without
    copies of them.
    """

    replay: Replay
    probe: Probe
    weights: list[float]
    unchanged: list[_Alone] = field(default_factory=list)

    def of(self, probe: Probe) -> Coupling | None:
        """Compare on the probe itself."""
        self.unchanged = [self._alone(batch, i) for i, batch in enumerate(probe.singles)]
        return self._compare(probe.batch, self.unchanged)

    def of_changed(self, change: Change) -> Coupling | None:
        """Compare on changed samples; one that the loss cannot take stays as it is.

        Returns:
            The coupling, if there is one.
        """
        items, alone = list(self.probe.items), list(self.unchanged)
        for i in range(len(items)):
            try:
                changed = _changed(change, i, items[i])
                if changed is None:
                    continue
                of_sample = self._alone(self.probe.collate([changed]), i)
            except _FAILS:
                continue
            if of_sample.finite:
                items[i], alone[i] = changed, of_sample
        if all(a is b for a, b in zip(items, self.probe.items, strict=True)):
            return None
        try:
            return self._compare(self.probe.collate(items), alone, "once labels are rare, missing, ignored or alike")
        except _FAILS:
            return None

    def _alone(self, batch: Any, sample: int) -> _Alone:
        gradients = self.replay.gradients(batch, self.replay.alone[sample])
        return _Alone(gradients, tuple(map(_largest, gradients)))

    def _drift(self) -> float:
        """How much the loss of the first sample has changed since it was computed, relatively."""
        before, after = self.unchanged[0], self._alone(self.probe.singles[0], 0)
        pairs = zip(after.gradients, before.gradients, strict=True)
        return max((_difference(a, b) for a, b in pairs), default=0.0) / max((*before.largest, 1e-12))

    def _compare(self, batch: Any, alone: list[_Alone], when: str = "") -> Coupling | None:
        whole = self.replay.gradients(batch, self.replay.together)
        scales = [max(of_output) for of_output in zip(*(one.largest for one in alone if one.finite), strict=True)]
        worst = 0.0
        for sample, (wanted, weight) in enumerate(zip(alone, self.weights, strict=True)):
            if not wanted.finite:
                continue
            found = self.replay.part(whole, sample)
            for got, one, scale, rows in zip(found, wanted.gradients, scales, self.replay.rows, strict=True):
                if rows is not None:
                    worst = max(worst, _difference(got, one, weight) / max(scale, 1e-12))
        if worst <= (_IN_DOUBLE if self.replay.double else _IN_SINGLE) or worst <= 10 * self._drift():
            return None
        return Coupling(worst, when)


def _largest(tensor: torch.Tensor) -> float:
    """The largest size of a number in a tensor, no number if one is none; in one pass, without a copy."""
    return max(map(abs, map(float, tensor.aminmax()))) if tensor.numel() else 0.0


def _difference(got: torch.Tensor, one: torch.Tensor, weight: float = 1.0) -> float:
    """Largest difference of ``got / weight``; where the batch pads a sample, the padding has to get nothing."""
    if got.shape != one.shape:
        padded = torch.zeros_like(got)
        padded[tuple(slice(0, size) for size in one.shape)] = one
        one = padded
    difference = _largest(torch.sub(got, one, alpha=weight)) / abs(weight)
    return difference if difference == difference else float("inf")


def _changed(change: Callable[[int, pytree.Path, Any], Any], sample: int, item: Any) -> Any | None:
    """The changed sample; ``None`` if it stays."""
    new = False

    def of_leaf(path: pytree.Path, leaf: Any) -> Any:
        nonlocal new
        out = change(sample, path, leaf)
        new |= out is not leaf
        return out

    item = pytree.map_leaves(of_leaf, item)
    return item if new else None

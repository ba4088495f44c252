"""The guard of one private training: on every real step it runs the checks, before any parameter moves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from opacus.optimizers import DPOptimizer

from dpfix.engines.base import zeros
from dpfix.instrument.grad_watch import GradWatch
from dpfix.instrument.source import warn_user
from dpfix.plan import Plan
from dpfix.training.guards.check import SCHEDULED, Check, Guarded
from dpfix.training.guards.draws import DrawnRows, NewDraw, OneBackward, SomethingArrived
from dpfix.training.guards.gradients import FiniteSum, ThroughTheEngine, UneditedGradients
from dpfix.training.guards.loss import UncoupledLoss
from dpfix.training.guards.model import FixedNorms, SameGroups, SameStructure
from dpfix.training.guards.no_grad_regions import RegionsUntouched
from dpfix.training.guards.optimizers import ClearedGradients, NoGradScaler, NoOtherOptimizer
from dpfix.training.guards.parameter_writes import ParameterWrites
from dpfix.training.guards.ranks import RanksAgree
from dpfix.training.guards.scratch import ScratchPutBack


class StepGuard:
    """The guard of one private training.

    Args:
        guarded: the training.
        optimizer: its private optimizer, as the call has set it up.
        called: see the attribute; what the optimizer says now, if not given.

    Attributes:
        guarded: the training.
        called: what the call said, by attribute of the optimizer, which a scheduler may change.
        regions: the check that may leave out a step.
        ranks: the check that tells other processes of a failure.
        others: the check that has to know when the private optimizer is stepping.
        checks: all checks, in order.
        engine_clips: whether the engine clips in the step that is being made.
        leaves_out: leaves out the step that is being made, if it is to be; takes the optimizer and what ends the step.
    """

    def __init__(self, guarded: Guarded, optimizer: DPOptimizer, called: dict[str, Any] | None = None) -> None:
        self.guarded = guarded
        self.called = called or {name: copy.deepcopy(getattr(optimizer, name)) for name in SCHEDULED}
        watch = GradWatch(guarded.parameters)
        self.regions = RegionsUntouched(guarded)
        self.ranks = RanksAgree(guarded)
        self.others = NoOtherOptimizer(guarded)
        self.checks: tuple[Check, ...] = (
            ClearedGradients(),
            UncoupledLoss(guarded),
            NoGradScaler(),
            SameStructure(guarded),
            SameGroups(guarded),
            FixedNorms(guarded),
            ParameterWrites(guarded),
            ThroughTheEngine(guarded, watch),
            UneditedGradients(watch),
            OneBackward(guarded),
            NewDraw(guarded),
            SomethingArrived(),
            DrawnRows(guarded),
            FiniteSum(guarded),
            ScratchPutBack(guarded),
            self.regions,
            self.ranks,
            self.others,
        )
        self.engine_clips = False
        self.leaves_out: Callable[[Any, Callable[[], None]], None] | None = None
        self._trained = list(guarded.parameters.values())
        self._counts: list[int] = []
        self._norms: torch.Tensor | None = None
        self._cleared = self._those_at("cleared")
        self._before_step = self._those_at("before_step")
        self._collected = self._those_at("collected")
        self._summed = self._those_at("summed")
        self._before_noise = self._those_at("before_noise")
        self._after_step = self._those_at("after_step")

    def _those_at(self, moment: str) -> tuple[Callable[..., None], ...]:
        """What the checks do at a moment, without those that do nothing."""
        needed = [check for check in self.checks if check.needed]
        return tuple(getattr(c, moment) for c in needed if getattr(type(c), moment) is not getattr(Check, moment))

    @property
    def plan(self) -> Plan:
        """How the model is being trained; a no-grad region that gradient has reached is no longer in it."""
        return self.regions.plan

    def cleared(self) -> None:
        """``zero_grad`` was called."""
        self.guarded.handle.clear()
        for check in self._cleared:
            check()
        if not self.guarded.progress.partial:
            self.guarded.forget_sum()  # model.zero_grad() has to clear what was released as optimizer.zero_grad() does

    def before_step(self, optimizer: DPOptimizer) -> bool:
        """Check everything, and leave the per-sample gradients where Opacus expects them.

        Args:
            optimizer: the private optimizer.

        Returns:
            Whether the step can be made; if not, it is left out.

        Raises:
            MisuseError: an assumption of the guarantee does not hold; nothing has moved.
        """
        guarded = self.guarded
        guarded.accounting.new_step()
        if self.leaves_out is not None:
            self.leaves_out(optimizer, self._settle)
            return False
        if self.regions.needed and self.regions.leaves_out(optimizer, self._settle):
            return False
        for check in self._before_step:
            check(optimizer)
        self.engine_clips = guarded.handle.clips and optimizer.flat  # type: ignore[attr-defined]
        self._norms = None
        counts = (guarded.handle.announce if self.engine_clips else guarded.handle.collect)(self._trained)
        drawn = None if guarded.ledger is None else guarded.ledger.pending()
        for check in self._collected:
            check(optimizer, counts, drawn)
        self._counts = self._nothing_drawn() if drawn == 0 else counts
        return True

    def _nothing_drawn(self) -> list[int]:
        """The placeholder of an empty draw contributes nothing."""
        for p in self._trained:
            p.grad_sample = zeros(p, 0)  # type: ignore[attr-defined]
        return [0]

    def clip(self, optimizer: DPOptimizer) -> bool:
        """Let the engine clip, if it can do so without per-sample gradients.

        Args:
            optimizer: the private optimizer.

        Returns:
            Whether the sum is there; for an empty draw it is zero, whatever the clipping.
        """
        if self._counts == [0]:
            self._add_nothing()
            return True
        if not self.engine_clips:
            return False
        for p in self._trained:
            p.grad = None  # of the step before; the noise is about to make a new one
        clip_and_accumulate = self.guarded.handle.clip_and_accumulate
        self._norms = clip_and_accumulate(self._trained, optimizer.max_grad_norm, keep=False)  # type: ignore[arg-type]
        return True

    def _add_nothing(self) -> None:
        for p in self._trained:
            if getattr(p, "summed_grad", None) is None:
                p.summed_grad = torch.zeros_like(p, requires_grad=False)  # type: ignore[attr-defined]

    def summed(self) -> None:
        """The clipped sum of a physical batch is there."""
        for check in self._summed:
            check(self._norms)

    def before_noise(self, optimizer: DPOptimizer) -> None:
        """The logical batch is about to be released."""
        for check in self._before_noise:
            check(optimizer)

    def after_step(self, released: bool) -> None:
        """A physical batch was processed.

        Args:
            released: whether the logical batch is complete.
        """
        progress = self.guarded.progress
        if released:
            progress.partial = 0
            progress.released += 1
        else:
            progress.partial += sum(self._counts)
        self.guarded.handle.finish()
        for check in self._after_step:
            check(released)

    def _settle(self) -> None:
        self.after_step(released=True)

    def begin_pass(self, optimizer: Any) -> None:
        """A new pass over the loader begins; what a BatchMemoryManager had signalled for the one before is forgotten.

        Left inside a logical batch, its loop has summed up a part of one, which is not released.
        """
        if self.guarded.progress.partial:
            warn_user(
                "a BatchMemoryManager loop was left inside a logical batch; the part that was summed up so far is "
                "discarded. Let the loop reach the end of a logical batch before leaving it."
            )
        optimizer._step_skip_queue.clear()
        optimizer._is_last_step_skipped = False
        self.guarded.progress.partial = 0
        self.guarded.forget_sum()

    def check_unchanged(self, optimizer: DPOptimizer) -> None:
        """Model and optimizer are still those of the call.

        Raises:
            PlanBrokenError: they are not.
        """
        for check in self.checks:
            if check.needed and isinstance(check, (SameStructure, SameGroups, FixedNorms)):
                check.before_step(optimizer)

    def detach(self) -> None:
        """Take everything off the model; the training is over."""
        for check in self.checks:
            check.detach()
        self.guarded.handle.detach()

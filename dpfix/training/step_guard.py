"""The guard of one private training: on every real step it runs the checks, before any parameter moves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from opacus.optimizers import DPOptimizer

from dpfix.engines.base import zeros
from dpfix.instrument.grad_watch import GradWatch
from dpfix.plan import Plan
from dpfix.training.guards.budget import WithinBudget
from dpfix.training.guards.check import SCHEDULED, Check, Guarded
from dpfix.training.guards.draws import CalledDraw, DrawnRows, NewDraw, OneBackward, SomethingArrived, WholeDraws
from dpfix.training.guards.following import Following
from dpfix.training.guards.frozen_parameters import FrozenUnreached
from dpfix.training.guards.gradients import FiniteSum, ThroughTheEngine, UneditedGradients
from dpfix.training.guards.memory import BegunAgain
from dpfix.training.guards.model import FixedNorms, SameGroups, SameStructure
from dpfix.training.guards.no_grad_regions import RegionsUntouched
from dpfix.training.guards.noise import ProvenNoise
from dpfix.training.guards.optimizers import ClearedGradients, NoGradScaler, NoOtherOptimizer, StepsInside
from dpfix.training.guards.parameter_writes import ParameterWrites
from dpfix.training.guards.ranks import RanksAgree, WrappedBefore
from dpfix.training.guards.real_steps import RealSteps
from dpfix.training.guards.scratch import ScratchPutBack
from dpfix.training.guards.shards import ShardsHeld


class StepGuard:
    """The guard of one private training.

    Args:
        guarded: the training.
        optimizer: its private optimizer, as the call has set it up.
        following: what is known about its real steps.
        earlier: the guard so far, where this one takes its place.

    Attributes:
        guarded: the training.
        called: what the call said, by attribute of the optimizer, which a scheduler may change.
        finite: the check that clips without samples whose gradient is not finite.
        regions: the check that may leave out a step.
        frozen: the check that knows which frozen parameters gradient has reached.
        ranks: the check that tells other processes of a failure.
        real_steps: the check that proves real steps.
        noise: the check that remembers noise.
        others: the check that has to know when the private optimizer is stepping.
        memory: the check that leaves out a step for which the memory did not suffice.
        draws: the check that knows which draw the step is made on, and whether it completes it.
        checks: all checks, in order.
        engine_clips: whether the engine clips in the step that is being made.
        leaves_out: leaves out the step that is being made, if it is to be; takes the optimizer and what ends the step.
    """

    def __init__(
        self, guarded: Guarded, optimizer: DPOptimizer, following: Following, earlier: StepGuard | None = None
    ) -> None:
        self.guarded = guarded
        values = {name: copy.deepcopy(getattr(optimizer, name)) for name in SCHEDULED}
        self.called = values if earlier is None else earlier.called
        watch = GradWatch(guarded.parameters)
        self.finite = FiniteSum(guarded)
        self.regions = RegionsUntouched(guarded)
        self.frozen = FrozenUnreached(guarded)
        self.ranks = RanksAgree(guarded)
        self.real_steps = RealSteps(guarded, following)
        self.noise = ProvenNoise(guarded)
        self.others = NoOtherOptimizer(guarded, self.real_steps.outside)
        self.draws = WholeDraws(guarded)
        self.memory = BegunAgain(guarded)
        self.checks: tuple[Check, ...] = (
            ClearedGradients(guarded, optimizer),
            NoGradScaler(),
            StepsInside(),
            ShardsHeld(guarded),
            SameStructure(guarded),
            SameGroups(guarded),
            FixedNorms(guarded),
            ParameterWrites(guarded),
            self.frozen,
            self.real_steps,
            ThroughTheEngine(guarded, watch),
            UneditedGradients(watch),
            CalledDraw(guarded),
            self.draws,
            self.memory,
            OneBackward(guarded),
            NewDraw(guarded),
            SomethingArrived(),
            DrawnRows(guarded),
            self.finite,
            self.noise,
            ScratchPutBack(guarded),
            self.regions,
            WithinBudget(guarded),
            self.ranks,
            WrappedBefore(guarded),
            self.others,
        )
        known: tuple[Any, ...] = () if earlier is None else earlier.checks
        for check, before in zip(self.checks, known, strict=False):
            check.take_over(before)
        self.engine_clips = False
        self.leaves_out: Callable[[Any, Callable[[], None]], None] | None = None
        self._trained = list(guarded.parameters.values())
        self._counts: list[int] = []
        self._noise_due = False
        self._norms: torch.Tensor | None = None
        self._cleared = self._those_at("cleared")
        self._before_step = self._those_at("before_step")
        self._collected = self._those_at("collected")
        self._summed = self._those_at("summed")
        self._before_noise = self._those_at("before_noise")
        self._noised = self._those_at("noised")
        guarded.accounting.at_release = self.noised
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
        self.draws.turn_to_present()
        if self.memory.due:
            self.after_step(released=False)
            return False
        leaves_out = self.leaves_out or self.frozen.leaves_out
        if leaves_out is not None:
            leaves_out(optimizer, self._settle)
            return False
        if self.regions.needed and self.regions.leaves_out(optimizer, self._settle):
            return False
        with self.memory.giving_up():
            self._make_ready(optimizer)
        if self.memory.due:
            self.after_step(released=False)
            return False
        return True

    def _make_ready(self, optimizer: DPOptimizer) -> None:
        """All checks up to the clipping, for which per-sample gradients are made."""
        for check in self._before_step:
            check(optimizer)
        handle = self.guarded.handle
        self.engine_clips = handle.clips and optimizer.by_scheme  # type: ignore[attr-defined]
        self._norms = None
        counts = (handle.announce if self.engine_clips else handle.collect)(self._trained)
        drawn = self.draws.turn_to_present(counts)
        for check in self._collected:
            check(optimizer, counts, drawn)
        self._counts = self._nothing_drawn() if drawn == 0 else counts

    def _nothing_drawn(self) -> list[int]:
        """The placeholder of an empty draw contributes nothing."""
        for p in self._trained:
            p.grad_sample = zeros(p, 0)  # type: ignore[attr-defined]
        return [0]

    def clip(self, optimizer: DPOptimizer, by_opacus: Callable[[], None]) -> None:
        """Make the clipped sum: by the engine, if it can do so without per-sample gradients; it is zero for an empty draw.

        Args:
            optimizer: the private optimizer.
            by_opacus: the optimizer's own clipping.
        """
        if self._counts == [0]:
            self._add_nothing()
            return
        if not self.engine_clips:
            self._norms = self.finite.clip(optimizer, by_opacus)
            return
        for p in self._trained:
            p.grad = None  # of the step before; the noise is about to make a new one
        clip_and_accumulate = self.guarded.handle.clip_and_accumulate
        self._norms = clip_and_accumulate(self._trained, optimizer.max_grad_norm, keep=False)  # type: ignore[arg-type]
        optimizer.count(self._norms)  # type: ignore[attr-defined]

    def _add_nothing(self) -> None:
        shards = self.guarded.shards
        for p in self._trained:
            if shards is not None:
                shards.add(p, None)
            elif getattr(p, "summed_grad", None) is None:
                p.summed_grad = torch.zeros_like(p, requires_grad=False)  # type: ignore[attr-defined]

    def summed(self) -> None:
        """The clipped sum of a physical batch is there."""
        self._noise_due = True
        for check in self._summed:
            check(self._norms)

    def before_noise(self, optimizer: DPOptimizer) -> None:
        """The logical batch is about to be released."""
        for check in self._before_noise:
            check(optimizer)

    def noised(self, optimizer: DPOptimizer) -> None:
        """The release is complete, and about to be accounted; the second call for a release does nothing."""
        if not self._noise_due:
            return
        self._noise_due = False
        for check in self._noised:
            check(optimizer)

    def after_step(self, released: bool) -> None:
        """A physical batch was processed.

        Args:
            released: whether the logical batch is complete.
        """
        progress = self.guarded.progress
        if self.memory.due:
            self._counts, self._noise_due = [], False
            self.memory.begin_again(self.draws.summed)
            self.cleared()
        if released:
            self._noise_due = False  # of a sum that was given up
            progress.partial = 0
            progress.released += 1
        else:
            progress.partial += sum(self._counts)
            self.guarded.accounting.parts += not self.guarded.accounting.in_parts
        self.guarded.handle.finish()
        for check in self._after_step:
            check(released)

    def _settle(self) -> None:
        self.after_step(released=True)

    def check_unchanged(self, optimizer: DPOptimizer) -> None:
        """Model and optimizer are still those of the call.

        Raises:
            PlanBrokenError: they are not.
        """
        for check in self.checks:
            if check.needed and isinstance(check, (SameStructure, SameGroups, FixedNorms)):
                check.before_step(optimizer)

    def make_way(self) -> None:
        """Take everything off the model for another guard, which takes over what this one knows."""
        for check in self.checks:
            check.make_way()
        self.guarded.handle.detach()

    def detach(self) -> None:
        """Take everything off the model; the training is over."""
        for check in self.checks:
            check.detach()
        self.guarded.handle.detach()
        self.guarded.accounting.end()

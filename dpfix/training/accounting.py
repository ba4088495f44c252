"""The accountant counts every draw once, whatever the loop does with it and the script attaches, loads or empties.

What is counted is what the way of sampling allows to prove: a Poisson draw with its rate; with ``sampling="shuffle"`` a pass
as one release of rate 1, since a sample is in one of its batches; with ``"fixed"`` every step as a release of rate 1, with less
noise where a sample may be in it several times. So everybody who reads the history, Opacus too, reads what holds.

A draw that is stepped on is counted at its step. One that was delivered and not stepped on is counted when its pass is over,
when the next one begins, when epsilon is asked for and when the training ends, whichever comes first: what the loop does may
depend on its samples. A step that comes later is not counted again unless it is made with less noise.
"""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from opacus import PrivacyEngine
from opacus.optimizers import AdaClipDPOptimizer, DPOptimizer

from dpfix.errors import BudgetError, CheckpointError, MisuseError
from dpfix.instrument.source import warn_user
from dpfix.report.statement import Stretch
from dpfix.sampling.draw import Draw
from dpfix.sampling.ledger import DrawLedger
from dpfix.sampling.one_pass import Pass
from dpfix.sampling.own_loader import Deliveries
from dpfix.sampling.population import Population
from dpfix.sampling.ranks import Ranks
from dpfix.scan.arguments import check_delta, check_names
from dpfix.training.earlier import ENTRY, entry_of, refuse_units_of, steps_shown, with_entry, without_entry
from dpfix.training.epsilon import ACCURACY, Accuracy, spent
from dpfix.training.lineage import remember
from dpfix.training.releases import Releases, book_of, read_state, settled
from dpfix.training.spender import Spender

StepHook = Callable[[DPOptimizer], None]
REFUSED = math.inf
"""Stands for the noise of a draw that a budget has refused: nothing was released, and a step with any noise is a release."""


class Accounting:
    """Counts every draw once, also if the script attaches the accountant's hook again or replaces it.

    Costs some 20 us per step.

    Args:
        optimizer: the private optimizer.
        engine: Opacus's privacy engine; its accountant at the time of a step counts it.
        data: the records that are drawn from.
        rate: with which a release is counted; see :func:`~dpfix.sampling.rate.accounted_rate`.
        ledger: what was drawn; ``None`` with the script's own loader.
        sampling: how batches are drawn.

    Attributes:
        at_release: looks at what is about to be released, before it is counted.
        loads: how many states the optimizer has loaded.
        own_loader: what the script's own loader hands out.
        parts: physical batches of the release that is being made that came before the last one.
        spender: writes every release into the file of a budget; ``None`` without one.
    """

    def __init__(
        self,
        optimizer: DPOptimizer,
        engine: PrivacyEngine,
        data: Population,
        rate: float = 1.0,
        ledger: DrawLedger | None = None,
        sampling: str = "poisson",
    ) -> None:
        self.engine, self._data, self._rate = engine, data, rate
        self._optimizer, self._ledger, self._by_pass = optimizer, ledger, sampling == "shuffle"
        self.own_loader: Deliveries | None = None
        self.spender: Spender | None = None
        self.parts = 0
        self._parameters = list(optimizer.params)
        self._counted, self._unexplained = False, 0
        self._draw: Draw | None = None
        self._without_step = 0
        self._warned, self.loads = False, 0
        self._lock = threading.RLock()  # a pass may end in another thread
        self.at_release: Callable[[DPOptimizer], None] | None = None
        self._begin()
        optimizer.step_hook = self.count
        book_of(engine).accountings.add(self)

    def _begin(self) -> None:
        """A training begins: a call's, or that of a forked process, whose releases are others than the first one's."""
        self._own = Releases(self._data)
        book_of(self.engine).trainings[self._own.name] = self._own
        remember(self._parameters, [self._own])
        if self.spender is not None:
            self.spend_from(self.spender)

    def agree(self, ranks: Ranks) -> None:
        """The ranks make one training, by the name that it has on the first: a state that one of them saves is that of all."""
        trainings = book_of(self.engine).trainings
        del trainings[self._own.name]
        self._own.name = ranks.exchange(self._own.name)[0]
        trainings[self._own.name] = self._own

    def _begin_in_fork(self) -> None:
        """What the first process has counted are its own releases: those of a fork have noise of their own."""
        if self._own.process != os.getpid():
            if self._ledger is not None:
                self._ledger.forget_accounted()
            if self._draw is not None:
                self._draw.accounted = self._draw.of.accounted = None
            self._begin()

    def spend_from(self, spender: Spender) -> None:
        """From now on every release is written into the file of a budget before it leaves."""
        self.spender = spender.begin(self._own.name)
        self._own.budget = str(spender.account.file.path)
        weakref.finalize(self, self.spender.let_go).atexit = False

    def new_step(self, draw: Draw | None = None) -> None:
        """The next release is another one.

        Args:
            draw: the Poisson draw that it is made of, where one is known.
        """
        self._counted = False
        self._draw = draw

    def count(self, optimizer: DPOptimizer) -> None:
        """A batch is released.

        Raises:
            MisuseError: the accountant cannot count it.
        """
        with self._lock:
            if self._counted:
                return
            if self.at_release is not None:
                self.at_release(optimizer)
            self._counted = True
            self._take_loaded(optimizer)
            if self._unexplained:
                self._tell_unexplained()
            self._begin_in_fork()
            counted = self._counted_as(self._draw)
            before = None if counted is None else counted.accounted
            noise = float(optimizer.noise_multiplier)
            if before is None or noise < before:
                self._release(optimizer, noise / self.times(optimizer))
            elif not self._by_pass:
                self._without_step -= 1
            if self._draw is not None and counted is not None:
                self._draw.accounted = noise
                counted.accounted = noise if before is None else min(noise, before)
            self.parts = 0

    def reserve(self, optimizer: DPOptimizer) -> None:
        """A batch is about to be released: the file of the budget has to hold it, and whatever was delivered and skipped.

        Raises:
            BudgetError: it would go beyond the budget, or cannot be written; the draw is no release then.
        """
        assert self.spender is not None
        with self._lock:
            self._begin_in_fork()
            self._take_loaded(optimizer)
            counted, noise = self._counted_as(self._draw), float(optimizer.noise_multiplier)
            if counted is not None and counted.accounted is not None and noise >= counted.accounted:
                return
            skipped = [] if self._by_pass or self._ledger is None else self._ledger.unaccounted()
            least = 1 + sum(draw is not self._draw for draw in skipped)
            try:
                self.spender.reserve((noise / self.times(optimizer), self._rate), least)
            except BudgetError:
                skipped_before = isinstance(counted, Pass) and any(d is not self._draw for d in counted.unreleased)
                if self._draw is not None and counted is not None and counted.accounted is None and not skipped_before:
                    self._draw.accounted = counted.accounted = REFUSED
                raise

    def _take_loaded(self, optimizer: DPOptimizer) -> None:
        """Count on from a saved state that was loaded into the optimizer inside."""
        if ENTRY in optimizer.param_groups[0]:
            self.take(optimizer.param_groups[0].pop(ENTRY))

    def _counted_as(self, draw: Draw | None) -> Draw | Pass | None:
        """What a release is counted once for."""
        return draw if draw is None or not self._by_pass else draw.of

    def times(self, optimizer: DPOptimizer) -> int:
        """How often a sample may be in the release that is being made, each time with the whole clip norm."""
        if self._ledger is not None or self.own_loader is None:
            return 1  # one backward pass on one draw, as the guards of every step see to
        return self.own_loader.most_times * (optimizer.accumulated_iterations + self.parts)

    @property
    def in_parts(self) -> bool:
        """Whether physical batches are parts of the batches of the script's own loader, which a ``BatchMemoryManager`` makes."""
        return self.own_loader is not None and self.own_loader.in_parts

    def _release(self, optimizer: DPOptimizer, noise: float) -> None:
        self._begin_in_fork()
        step = Stretch(1, noise, self._rate, _clip_norm(optimizer))
        if self.spender is not None:
            self.spender.release((noise, self._rate))
        accountant: Any = self.engine.accountant
        try:
            book_of(self.engine).release(accountant, self._own, step)
        except ValueError as error:
            raise MisuseError(
                f"the {accountant.mechanism()} accountant cannot count this step, with "
                f"noise_multiplier={optimizer.noise_multiplier}: {error}",
                "What it cannot count would be missing in epsilon.",
                "Keep noise and sampling rate as they are, or use SafePrivacyEngine(accountant='prv').",
                path="privacy_engine",
            ) from error

    def before(self, hook: StepHook) -> StepHook:
        """A step hook that counts the step, and then does what the script wants; Opacus's optimizers keep one hook only."""

        def both(optimizer: DPOptimizer) -> None:
            self.count(optimizer)
            hook(optimizer)

        return both

    def complete(self) -> None:
        """Count the draws that were delivered and not stepped on."""
        if self._ledger is None:
            return
        with self._lock:
            noise = float(self._optimizer.noise_multiplier)
            for draw in self._ledger.unaccounted():
                counted = self._counted_as(draw)
                if counted is None or counted.accounted is None:
                    self._release(self._optimizer, noise)
                    self._without_step += not self._by_pass
                draw.accounted = noise
                if isinstance(counted, Pass) and counted.accounted is None:
                    counted.accounted = noise

    def at_end_of_pass(self) -> None:
        """As :meth:`complete`; what the accountant cannot count now is told when it is asked for."""
        with suppress(MisuseError, BudgetError):  # a generator that is closed cannot raise
            self.complete()

    def name_skipped(self, passes: int = 0) -> None:
        """Say once that draws were delivered and not stepped on.

        Args:
            passes: say nothing about so many of the last passes, whose draws the loop may still be working on.
        """
        if self._warned or self._ledger is None:
            return
        if skipped := [d for d in self._ledger.skipped(passes) if d.accounted != REFUSED]:
            self.warn(
                f"{len(skipped)} draw(s) of the data_loader were skipped: delivered without an optimizer.step(), first draw "
                f"{skipped[0].number} of its pass. They are accounted as if they had been released, since what the loop does "
                "may depend on their samples."
            )

    def warn(self, text: str) -> None:
        """Warn about skipped draws, once per training."""
        if not self._warned:
            self._warned = True
            warn_user(text)

    def end(self) -> None:
        """The training is over."""
        try:
            self.complete()
        finally:
            if self._ledger is not None:
                self._ledger.close()
            if self.spender is not None:
                self.spender.end()

    @property
    def steps(self) -> int:
        """Steps that the accountant has counted, without draws counted before or without their step."""
        return accounted_steps(self.engine.accountant) - self._without_step

    # ------------------------------------------------------------------ the state of the optimizer

    def written(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The state of the optimizer with everything that was released."""
        return with_entry(state, self.releases())

    def releases(self) -> dict[str, Any]:
        """Everything that was released, as plain values."""
        self.complete()
        book = book_of(self.engine)
        book.settle(self.engine.accountant)
        return book.state()

    def load(self, state: Mapping[str, Any], load: Callable[[dict[str, Any]], None]) -> None:
        """Load the state of an optimizer, and count on from what it says was released.

        Args:
            state: a private optimizer's, or another's.
            load: loads it into the optimizer.

        Raises:
            CheckpointError: what it says about releases cannot be read, or is of other units; nothing has changed.
            ArgumentError: the accountant cannot add up steps of several settings; nothing has changed.
        """
        entry = entry_of(state)
        if entry is not None:
            releases, others = read_state(entry)
            refuse_units_of(releases, self._data, CheckpointError)
            book_of(self.engine).united(self.engine.accountant, releases, others)
        load(without_entry(state))
        self.loads += 1
        if entry is not None:
            self.take(entry)
        else:
            self._unexplained = steps_shown(state)

    def take(self, entry: Any) -> None:
        """Count on from what was released, as :meth:`releases` wrote it.

        Args:
            entry: plain values.

        Raises:
            CheckpointError: they cannot be read, or are of other units; nothing has changed.
        """
        releases, others = read_state(entry)
        refuse_units_of(releases, self._data, CheckpointError)
        for r in releases:
            r.data = self._data  # the state of a training that goes on
        book = book_of(self.engine)
        known = {r.name: r.steps for r in releases}
        mine = {self._own.name, *known}
        since = sum(max(0, book.steps_of(name) - known.get(name, 0)) for name in mine)
        book.take(self.engine.accountant, releases, others)
        if self.spender is not None:
            self.spender.add_earlier(releases)
        remember(self._parameters, [book.trainings[name] for name in known])
        if since:
            warn_user(
                f"optimizer: the state that was loaded is an earlier one: {since} steps were released since it was saved. "
                "Nothing takes them back: epsilon counts them, and every further step."
            )

    def put_back(self) -> Callable[[], None]:
        """A function that makes what is counted what it is now."""
        book, unexplained = book_of(self.engine).put_back(), self._unexplained

        def undo() -> None:
            book()
            self._unexplained = unexplained

        return undo

    def _tell_unexplained(self) -> None:
        shown, self._unexplained = self._unexplained, 0
        if shown > self.steps:
            warn_user(
                f"optimizer: the state that was loaded comes from {shown} or more steps, and does not say what they released; "
                f"the accountant holds {self.steps}. If they were private steps on this data, epsilon is too small: load the "
                "accountant's history too. What the private optimizer's state_dict() gives holds it."
            )


def _clip_norm(optimizer: DPOptimizer) -> float | list[float] | str:
    if isinstance(optimizer, AdaClipDPOptimizer):
        return "adaptive"
    norm: Any = optimizer.max_grad_norm
    return [float(n) for n in norm] if isinstance(norm, (list, tuple)) else float(norm)


def answer_of(privacy_engine: Any, delta: float, **accuracy: Any) -> float:
    """What a privacy engine answers when it is asked for epsilon.

    Args:
        privacy_engine: of Opacus.
        delta: see :meth:`dpfix.PrivateTraining.get_epsilon`.
        **accuracy: ``alphas``, ``eps_error`` and ``delta_error``; see there.

    Returns:
        Epsilon.
    """
    delta = check_delta(delta)
    check_names(accuracy, ACCURACY, ("delta",))
    return spent(settled(privacy_engine), delta, Accuracy.of(delta, **accuracy)).epsilon


def accounted_steps(accountant: Any) -> int:
    """Steps in the history of one of Opacus's accountants."""
    return sum(entry[-1] for entry in accountant.history)

"""The accountant counts every draw once, whatever the loop does with it and the script attaches to the optimizer.

A draw that is stepped on is counted at its step. One that was delivered and not stepped on is counted when its pass is over,
when the next one begins, when epsilon is asked for and when the training ends, whichever comes first: what the loop does may
depend on its samples. A step that comes later is not counted again unless it is made with less noise.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

from opacus.optimizers import DPOptimizer

from dpfix.instrument.source import warn_user
from dpfix.sampling.ledger import Draw, DrawLedger

StepHook = Callable[[DPOptimizer], None]


class Accounting:
    """Counts every draw once, also if the script attaches the accountant's hook again or replaces it.

    Costs one call per step.

    Args:
        optimizer: the private optimizer, with the accountant's step hook.
        accountant: Opacus's accountant.
        rate: the sampling rate.
        ledger: what was drawn; ``None`` without Poisson sampling.
    """

    def __init__(
        self, optimizer: DPOptimizer, accountant: Any, rate: float = 1.0, ledger: DrawLedger | None = None
    ) -> None:
        self.accountant = accountant
        self._optimizer, self._rate, self._ledger = optimizer, rate, ledger
        self._account: StepHook = optimizer.step_hook  # type: ignore[assignment]
        self._counted = False
        self._draw: Draw | None = None
        self._without_step = 0
        self._warned = False
        self._lock = threading.RLock()  # a pass may end in another thread
        optimizer.step_hook = self.count
        _ALL.add(self)

    def new_step(self, draw: Draw | None = None) -> None:
        """The next release is another one.

        Args:
            draw: the Poisson draw that it is made of, where one is known.
        """
        self._counted = False
        self._draw = draw

    def count(self, optimizer: DPOptimizer) -> None:
        """A batch is released."""
        with self._lock:
            if self._counted:
                return
            self._counted = True
            before = None if self._draw is None else self._draw.accounted
            noise = float(optimizer.noise_multiplier)
            if before is None or noise < before:
                self._account(optimizer)
            else:
                self._without_step -= 1
            if self._draw is not None:
                self._draw.accounted = noise

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
                self.accountant.step(noise_multiplier=self._optimizer.noise_multiplier, sample_rate=self._rate)
                draw.accounted = noise
                self._without_step += 1

    def name_skipped(self, passes: int = 0) -> None:
        """Say once that draws were delivered and not stepped on.

        Args:
            passes: say nothing about so many of the last passes, whose draws the loop may still be working on.
        """
        if self._warned or self._ledger is None:
            return
        if skipped := self._ledger.skipped(passes):
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
        self.complete()
        if self._ledger is not None:
            self._ledger.close()

    @property
    def steps(self) -> int:
        """Steps that the accountant has counted, without draws counted before or without their step."""
        return accounted_steps(self.accountant) - self._without_step


_ALL: WeakSet[Accounting] = WeakSet()


def complete(accountant: Any) -> None:
    """Count all draws that were delivered in trainings of an accountant, before its history is read."""
    for accounting in tuple(_ALL):
        if accounting.accountant is accountant:
            accounting.complete()
            accounting.name_skipped()


def accounted_steps(accountant: Any) -> int:
    """Steps in the history of one of Opacus's accountants."""
    return sum(entry[-1] for entry in accountant.history)

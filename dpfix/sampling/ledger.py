"""The ledger of draws, which ties every step to the samples it was made with."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from dpfix.instrument import pytree


class DrawLedger:
    """How many samples every batch holds, in order: the loader writes it, the optimizer reads it at every step.

    Attributes:
        rounds: counts how often a sampler was started; a new round abandons what an old one left.
        counts: rows of every sample of the delivered batch, where samples may have different numbers of them.
        seed: seed of the present round, where several ranks draw it together.
        number: how many batches of the present round have been begun or, in a BatchMemoryManager, finished.
        at_start: called when a sampler begins a new pass.
        keeps: how many of the batches that were delivered last are kept.
        recent: these, newest last: everything that they hold, with the keys that lead there, and the number of samples drawn.
    """

    def __init__(self) -> None:
        self.rounds = 0
        self.seed = 0
        self.number = 0
        self.at_start: Callable[[], None] = lambda: None
        self.keeps = 0
        self.recent: list[tuple[list[tuple[pytree.Path, Any]], int | None]] = []
        self._drawn: deque[int] = deque()
        self._delivered: int | None = None
        self.counts: tuple[int, ...] = ()
        self._delivers = False  # whether the private loader itself hands out this round, or a BatchMemoryManager's

    def start(self, seed: int = 0) -> None:
        """A sampler begins a new pass; on several ranks, with a seed of its own."""
        self.at_start()
        self.rounds += 1
        self.seed, self.number = seed, 0
        self._drawn.clear()
        self._delivered = None
        self._delivers = False
        self.counts, self.recent = (), []

    def drew(self, samples: int) -> None:
        """A logical batch of this many samples was drawn."""
        self._drawn.append(samples)

    def deliver(self, counts: tuple[int, ...] = (), batch: Any = None) -> None:
        """The loader hands the oldest drawn batch to the loop; see :attr:`counts`."""
        self.counts = counts
        self._delivered = self._drawn.popleft() if self._drawn else None
        self._delivers = True
        self.number += 1
        if self.keeps:
            self.recent = [*self.recent, (pytree.parts(batch), self._delivered)][-self.keeps :]

    def pending(self) -> int | None:
        """Number of samples in the batch the loop is working on, or ``None`` if none was drawn."""
        if self._delivers:
            return self._delivered
        return self._drawn[0] if self._drawn else None

    def settle(self) -> None:
        """The batch was released in a step; it cannot be used again."""
        if self._delivers:
            self._delivered = None
        elif self._drawn:
            self._drawn.popleft()
            self.number += 1

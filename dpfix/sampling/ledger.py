"""The ledger of draws, which ties every step to the samples it was made with."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from dpfix.sampling.position import Position


class DrawLedger:
    """How many samples every batch holds, in order: the loader writes it, the optimizer reads it at every step.

    Attributes:
        rounds: counts how often a sampler was started; a new round abandons what an old one left.
        counts: rows of every sample of the delivered batch, where samples may have different numbers of them.
        seed: seed of the present round, where several ranks draw it together.
        number: how many batches of the present round have been begun or, in a BatchMemoryManager, finished.
        at_start: called when a sampler begins a new pass.
        position: where the training is in its pass, for checkpoints.
    """

    def __init__(self) -> None:
        self.rounds = 0
        self.seed = 0
        self.number = 0
        self.at_start: Callable[[], None] = lambda: None
        self.position = Position()
        self._drawn: deque[int] = deque()
        self._delivered: int | None = None
        self.counts: tuple[int, ...] = ()
        self._delivers = False  # whether the private loader itself hands out this round, or a BatchMemoryManager's

    def start(self, seed: int = 0, done: int = 0) -> None:
        """A sampler begins a new pass, or the rest of one.

        Args:
            seed: of the pass, where several ranks draw it together.
            done: batches of it that were released before a checkpoint.
        """
        self.at_start()
        self.rounds += 1
        self.seed, self.number = seed, done
        self._drawn.clear()
        self._delivered = None
        self._delivers = False
        self.counts = ()

    def drew(self, samples: int) -> None:
        """A logical batch of this many samples was drawn."""
        self._drawn.append(samples)

    def deliver(self, counts: tuple[int, ...] = ()) -> None:
        """The loader hands the oldest drawn batch to the loop; see :attr:`counts`."""
        self.counts = counts
        self._delivered = self._drawn.popleft() if self._drawn else None
        self._delivers = True
        self.number += 1

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
        self.position.done = self.number

"""Where a training is in its pass over the private loader, so that a checkpoint can go on from there.

A pass is known by its number of batches and the number of those that were released. With a seed it is made again: draws
come from where they began, workers get the seeds that they had and read once more what was released already, since what
they read at random follows from what they read before. Without a seed, the batches that are left are drawn anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from dpfix.instrument.rng import GeneratorStates


@dataclass(frozen=True)
class Rest:
    """A pass that was begun before a checkpoint, and is to be gone on with.

    Attributes:
        done: batches of it that were released.
        draws: where the stream of draws was when it began, by device; empty without a seed.
        workers: where the generator was that the workers' seeds come from, if there were workers.
        script: the script's generators when the checkpoint was saved; ``None`` without a seed.
    """

    done: int
    draws: Mapping[str, torch.Tensor]
    workers: torch.Tensor | None
    script: GeneratorStates | None


class Position:
    """Where a training is in its pass over the private loader.

    Attributes:
        reproducible: whether the training has a seed, so that a pass can be made again.
        batches: their number in a pass.
        passes: how many were begun.
        done: batches of the present pass that were released.
        rest: what the next pass is to go on with.
    """

    def __init__(self) -> None:
        self.reproducible = False
        self.batches = 0
        self.passes = 0
        self.done = 0
        self.rest: Rest | None = None
        self._in_pass = False
        self._draws: Mapping[str, torch.Tensor] = {}
        self._workers: torch.Tensor | None = None
        self._read_again = 0

    @contextmanager
    def seeding_workers(self, loader: DataLoader[Any]) -> Iterator[int]:
        """Inside, torch makes the iterator of a pass; its workers get the seeds that those of the rest had.

        Args:
            loader: the private loader.

        Yields:
            How many batches they read again, to no other end.
        """
        rest, generator = self.rest, torch.default_generator if loader.generator is None else loader.generator
        again = self.reproducible and loader.num_workers > 0
        before = generator.get_state() if again or rest is not None else None
        self._workers, self._read_again = None, 0
        if again:
            loader._iterator = None  # persistent workers would go on with what they drew in earlier passes
            self._workers = before
            if rest is not None and rest.workers is not None:
                self._workers, self._read_again = rest.workers, rest.done
                generator.set_state(rest.workers)
        yield self._read_again
        if rest is not None and before is not None:
            generator.set_state(before)  # it had seeded these workers before the checkpoint

    def begin(self, source: Any) -> tuple[int, int]:
        """A pass begins.

        Args:
            source: the stream of draws.

        Returns:
            How many of them were released before, and how many of those workers read again.
        """
        rest, self.rest = self.rest, None
        if rest is not None and rest.script is not None:
            source.go_on(rest.draws)
            rest.script.put_back()
        self.passes, self._in_pass, self.done = self.passes + 1, True, 0 if rest is None else rest.done
        self._draws = source.state() if self.reproducible else {}
        read_again, self._read_again = self._read_again, 0
        return self.done, read_again

    def leave(self, number: int) -> None:
        """A pass has ended, or the loop has left it; what follows is a new one.

        Args:
            number: of the pass.
        """
        if number == self.passes:
            self._in_pass, self.done = False, 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds; empty between two passes."""
        if not self._in_pass or self.done >= self.batches:
            return {}
        state: dict[str, Any] = {"done": self.done, "of": self.batches}
        if self.reproducible:
            state |= {"draws": dict(self._draws), "workers": self._workers}
        return state

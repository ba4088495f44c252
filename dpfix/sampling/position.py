"""Where a training is in its pass over the private loader, so that a checkpoint can go on from there.

A pass is known by its number of batches and the number of those that are done with. With a seed it is made again: it has a
seed of its own, workers get the seeds that they had and read once more what was released already, since what they read at
random follows from what they read before. Without a seed, the batches that are left are drawn anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from dpfix.instrument.rng import GeneratorStates

if TYPE_CHECKING:
    from dpfix.sampling.one_pass import Pass


@dataclass(frozen=True)
class Rest:
    """A pass that was begun before a checkpoint, and is to be gone on with.

    Attributes:
        done: batches of it that are done with.
        seed: of its draws; ``None`` without a seed of the training.
        workers: where the generator was that the workers' seeds come from, if there were workers.
        script: the script's generators when the checkpoint was saved; ``None`` without a seed.
    """

    done: int
    seed: int | None = None
    workers: torch.Tensor | None = None
    script: GeneratorStates | None = None


class Position:
    """Where a training is in its pass over the private loader.

    It is in the pass that was stepped on last, whatever other passes were begun since (to evaluate), as long as that has
    batches left; else in the one that was begun last.

    Attributes:
        reproducible: whether the training has a seed, so that a pass can be made again.
        batches: their number in a pass.
        rest: what passes are to go on with, up to the first step.
    """

    def __init__(self) -> None:
        self.reproducible = False
        self.batches = 0
        self.rest: Rest | None = None
        self._begun: Pass | None = None
        self._stepped: Pass | None = None

    @contextmanager
    def seeding_workers(self, loader: DataLoader[Any], begun: Pass) -> Iterator[None]:
        """Inside, torch makes the iterator of a pass; its workers get the seeds that those of the rest had.

        Args:
            loader: the private loader.
            begun: the pass.
        """
        rest, generator = self.rest, torch.default_generator if loader.generator is None else loader.generator
        again = self.reproducible and loader.num_workers > 0
        before = generator.get_state() if again or rest is not None else None
        if again:
            loader._iterator = None  # persistent workers would go on with what they drew in earlier passes
            begun.workers = before
            if rest is not None and rest.workers is not None:
                begun.workers, begun.reads_again = rest.workers, True
                generator.set_state(rest.workers)
        yield
        if rest is not None and before is not None:
            generator.set_state(before)  # it had seeded these workers before the checkpoint

    def begin(self, begun: Pass) -> int | None:
        """A pass of the private sampler begins.

        Args:
            begun: the pass.

        Returns:
            The seed of its draws, if it is one that was begun before the checkpoint and can be made again.
        """
        self._begun, rest = begun, self.rest
        begun.resumable = True
        if rest is None:
            return None
        begun.go_on_after(rest.done)
        if rest.script is not None:
            rest.script.put_back()
        return rest.seed

    def go_on(self, rest: Rest | None) -> Callable[[], None]:
        """Go on from a checkpoint.

        Args:
            rest: what the next pass is; ``None`` if it is a whole one.

        Returns:
            Undoes it.
        """
        before = self.rest, self._begun, self._stepped
        self.rest, self._begun, self._stepped = rest, None, None

        def undo() -> None:
            self.rest, self._begun, self._stepped = before

        return undo

    def released(self, of: Pass) -> None:
        """A draw of a pass was released."""
        self._stepped, self.rest = of, None

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds; empty between two passes."""
        if self.rest is not None:
            return self._state(self.rest.done, self.rest.seed, self.rest.workers)
        for one in (self._stepped, self._begun):
            if one is not None and one.goes_on and (done := one.done_with()) < self.batches:
                return self._state(done, one.seed, one.workers)
        return {}

    def _state(self, done: int, seed: int | None, workers: torch.Tensor | None) -> dict[str, Any]:
        again = {"seed": seed, "workers": workers} if self.reproducible else {}
        return {"done": done, "of": self.batches} | again

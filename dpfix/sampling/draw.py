"""A Poisson draw, or a part of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dpfix.sampling.one_pass import Pass

Counts = tuple[int, ...]


@dataclass(eq=False)
class Draw:
    """Samples that are delivered together: a Poisson draw or, in a ``BatchMemoryManager``, a part of one.

    Attributes:
        samples: how many there are.
        number: the draw's number in its pass, from 1.
        of: the pass.
        part_of: the draw that this is a part of; ``None`` for a whole one.
        counts: rows of every sample, where samples may have different numbers of them.
        delivered: whether the loop has got it.
        stepped: whether a step has taken its gradients.
        released: whether a step has released it.
        accounted: the noise multiplier with which the accountant has counted it; ``None`` if it has not.
        summed: samples of a whole draw whose gradients are in the sum that is not released yet.
        discarded: whether such a sum was thrown away, so that the draw can never be released.
        made: whether somebody else's loader has made its batch in this process.
        indices: of its samples in the dataset, where draws are handed out in parts; then it may be handed out again.
        times: how often a whole draw was begun again, or had been when this part of it was made.
    """

    samples: int
    number: int
    of: Pass = field(repr=False)
    part_of: Draw | None = None
    counts: Counts = ()
    delivered: bool = False
    stepped: bool = False
    released: bool = False
    accounted: float | None = None
    summed: int = 0
    discarded: bool = False
    made: bool = False
    indices: Sequence[int] = field(default=(), repr=False)
    times: int = 0

    @property
    def whole(self) -> Draw:
        """The Poisson draw: this one, or the one that it is a part of."""
        return self.part_of or self

    @property
    def completes(self) -> bool:
        """Whether all samples of the Poisson draw are summed up once these are."""
        return self.part_of is None or self.part_of.summed + self.samples == self.part_of.samples

    @property
    def given_up(self) -> bool:
        """Whether it is a part of a draw that was begun again since, or released before it was delivered again."""
        return self.part_of is not None and (
            self.times != self.part_of.times or (self.times > 0 and self.part_of.released)
        )

    def begin_again(self) -> None:
        """None of its parts so far counts; it is to be delivered again from its start."""
        self.times += 1
        self.summed = 0

    def fits(self, rows: int) -> bool:
        """Whether gradients of so many samples can be its own; an empty draw delivers one."""
        return rows == self.samples or (self.samples == 0 and rows <= 1)

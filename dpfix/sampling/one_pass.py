"""A pass of a sampler: what it has drawn, and what of it is delivered."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from dpfix.sampling.draw import Counts, Draw
from dpfix.sampling.rate import part_sizes

if TYPE_CHECKING:
    import torch

    from dpfix.sampling.ledger import DrawLedger


class Pass:
    """One pass of a sampler over the index set.

    Args:
        ledger: where it is recorded.
        delivers: whether the private loader itself hands out what is drawn. Otherwise somebody else's loader does so with its
            sampler (accelerate makes such loaders), and nobody says when: what was drawn counts as handed out.
        most: samples in a physical batch at most, where draws are handed out in parts.

    Attributes:
        asked: draws that are to be handed out again from their start, in smaller parts.
        seed: seed of the pass, where it has one of its own.
        workers: where the generator was that its workers' seeds come from, where it can be made again.
        reads_again: whether its workers read again what was released of it before a checkpoint.
        resumable: whether a checkpoint can say where the training is in it.
        over: whether nothing of it will be delivered any more.
        latest: number of the last draw that was released.
        accounted: the noise multiplier with which the accountant has counted it, where it counts passes.
        passed_over: draws at its beginning whose batches somebody else's loader does not make.
        unreleased: draws that were delivered and not released, in order.
    """

    def __init__(self, ledger: DrawLedger, *, delivers: bool, most: int | None = None) -> None:
        self.delivers, self._most = delivers, most
        self.asked: set[Draw] = set()
        self.seed, self.over, self.latest = 0, False, 0
        self.accounted: float | None = None
        self.workers: torch.Tensor | None = None
        self.reads_again = self.resumable = False
        self.passed_over = 0
        self.unreleased: dict[Draw, None] = {}
        self._ledger = ledger
        self._waiting: deque[Draw | None] = deque()  # and what is read again
        self._drawn = 0

    def go_on_after(self, done: int) -> None:
        """It is the rest of a pass, of which so many draws were done with before a checkpoint."""
        self.latest = self._drawn = done

    def drew_again(self, indices: Sequence[int]) -> None:
        """The sampler has made a draw of these samples again that was done with before a checkpoint."""
        self._waiting += [None] * (1 if self._most is None else len(self._split(indices)))

    def read_again(self) -> bool:
        """Whether the batch that comes next was read again, and is nobody's; then the one after it comes next."""
        again = bool(self._waiting) and self._waiting[0] is None
        if again:
            self._waiting.popleft()
        return again

    def drew(self, samples: int, indices: Sequence[int] = ()) -> None:
        """The sampler has drawn a batch of this many samples.

        Args:
            indices: in the dataset; one more than there are samples where a check leaves one out.
        """
        self._drawn += 1
        draw = Draw(samples, self._drawn, self)
        self._ledger.parts = [list(indices)]
        if not self.delivers and self._drawn <= self.passed_over:
            return
        if not self.delivers:
            self._ledger.hand_out(draw)
        elif self._most is None:
            self._waiting.append(draw)
        else:
            draw.indices = indices or range(samples)
            self._waiting += self._parts(draw)

    def _parts(self, draw: Draw) -> list[Draw]:
        parts = self._split(draw.indices)
        delivered = map(self._ledger.delivered_of, parts)
        return [
            Draw(n, draw.number, self, part_of=draw, times=draw.times, indices=own)
            for n, own in zip(delivered, parts, strict=True)
        ]

    def _split(self, indices: Sequence[int]) -> list[list[int]]:
        """The indices of every part of a draw; the sampler, in this thread, takes the same."""
        left = iter(indices)
        self._ledger.parts = [list(islice(left, size)) for size in part_sizes(len(indices), self._most or 1)]
        return self._ledger.parts

    def again(self, under_way: Collection[Draw]) -> list[list[int]]:
        """Begin draws again that were asked for, and what was read ahead in larger parts; all before them, too, in their order.

        Args:
            under_way: what was delivered and not stepped on.

        Returns:
            The indices of every part that is to be delivered next, in order.
        """
        before, limit = self._most, self._ledger.limit
        if before is None or limit is None or (limit >= before and not self.asked):
            return []
        self._most = min(before, limit)
        ahead = [d for d in under_way if d.of is self and d.part_of is not None and not d.given_up]
        coming = [d for d in self._waiting if d is not None and not d.given_up]
        due = {d.whole for d in (*ahead, *coming) if d.times or d.samples > self._most}
        due |= {*self.asked, *(d.whole for d in ahead if self.asked)}
        last = max((draw.number for draw in due), default=0)
        draws = sorted(
            self.asked | {d.whole for d in (*ahead, *coming) if d.number <= last}, key=lambda draw: draw.number
        )
        for draw in draws:
            if draw not in self.asked:
                draw.begin_again()
        self.asked.clear()
        rest = [d for d in self._waiting if d is None or not d.times]  # those that were repeated come from nowhere else
        parts = [part for draw in draws for part in self._parts(draw)]
        self._waiting = deque([*parts, *(None if d is None or d.given_up else d for d in rest)])
        return [list(part.indices) for part in parts]

    def deliver(self, batch: Any = None, counts: Counts = ()) -> None:
        """The private loader hands the oldest draw, or part of one, to the loop.

        Args:
            batch: what the loop gets.
            counts: see :attr:`Draw.counts`.
        """
        draw = self._waiting.popleft()
        assert draw is not None
        draw.counts = counts
        self._ledger.hand_out(draw, batch)

    def end(self) -> None:
        """Nothing of it will be delivered any more: it is exhausted, or the loop has left it.

        What was drawn and never delivered, since workers draw ahead, is no release: nothing was computed from it, and it is
        not accounted.
        """
        if not self.over:
            self.over = True
            self._waiting.clear()
            self._ledger.at_end()

    @property
    def goes_on(self) -> bool:
        """Whether something of it may be delivered, or is with somebody else's loader."""
        return self.resumable and not (self.delivers and self.over)

    def done_with(self) -> int:
        """How many draws from its first one on were released, or can never be: nothing of their batches is left."""
        missing = [d.number for d in self._ledger.steppable(self) if d.number < self.latest]
        return min(missing, default=self.latest + 1) - 1

    def accountable(self) -> list[Draw]:
        """Delivered draws that are not released.

        Returns:
            All of them; with somebody else's loader those before the last one that was stepped on and, once its sampler is
            exhausted, the others.
        """
        return [d for d in tuple(self.unreleased) if self.delivers or self.over or d.number < self.latest]

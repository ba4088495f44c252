"""The ledger of draws, which ties every step to the samples it was made with."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from dpfix.errors import ForeignBatchError
from dpfix.instrument import pytree
from dpfix.sampling.draw import Counts, Draw
from dpfix.sampling.one_pass import Pass
from dpfix.sampling.origin import Origins
from dpfix.sampling.position import Position


class DrawLedger:
    """Every draw, and which of them the loop is working on: sampler and loader write it, the optimizer reads it.

    The loop works on the draw with whose samples the private model was called last. Whoever can tell that says so with
    :meth:`work_on`; :meth:`draw_of` knows it for what the loader has delivered and for views of it. Where nobody can tell, the
    oldest draw is meant that was delivered, that no step was made on, and that has as many samples as gradients have arrived.

    A copy of a ledger is an empty one: what a copied loader delivers are not the batches of the training.

    Attributes:
        rounds: how many passes were begun.
        position: where the training is in its pass, for checkpoints.
        at_start: called when a pass begins.
        at_end: called when a pass is over.
        at_delivery: called with every batch that the loop gets, and its draw.
        passes_over: draws that the next pass passes over at its beginning; a step on one of them is refused.
        keeps: how many of the batches that were delivered last are kept.
        recent: these, newest last: everything that they hold, with the keys that lead there, the number of samples, the draw.
        limit: samples in a part of a draw at most, once memory ran out with more; ``None`` before.
        delivered_of: how many samples a draw of some indices delivers; fewer than it has only where a check leaves one out.
    """

    def __init__(self) -> None:
        self.rounds = 0
        self.position = Position()
        self.at_start: Callable[[Pass], None] = lambda begun: None
        self.at_end: Callable[[], None] = lambda: None
        self.at_delivery: Callable[[Any, Draw], None] = lambda batch, draw: None
        self.delivered_of: Callable[[list[int]], int] = len
        self.keeps = self.passes_over = 0
        self.recent: list[tuple[list[tuple[pytree.Path, Any]], int, Draw]] = []
        self.limit: int | None = None
        self._passes: list[Pass] = []
        self._open: dict[Draw, None] = {}  # delivered and not stepped on, oldest first
        self._worked: Draw | None = None
        self._closed = False
        self._origins = Origins()
        self._thread = threading.local()  # what this thread has asked for, and what it has drawn
        self._lock = threading.RLock()  # a loop may iterate over the loader in another thread

    def __reduce__(self) -> Any:
        return DrawLedger, ()

    # ------------------------------------------------------------------ drawn and delivered

    def expect(self, most: int | None = None) -> Pass:
        """The pass that begins next in this thread is one that the private loader delivers itself.

        Args:
            most: samples in a physical batch at most, where draws are handed out in parts.

        Returns:
            The pass.
        """
        least = most if most is None or self.limit is None else min(most, self.limit)
        self._thread.next, self._thread.drawn = Pass(self, delivers=True, most=least), None
        return self._thread.next

    @property
    def parts(self) -> list[list[int]]:
        """The indices of every part of what this thread has drawn last, where draws are handed out in parts."""
        return self._thread.parts

    @parts.setter
    def parts(self, parts: list[list[int]]) -> None:
        self._thread.parts = parts

    def start(self) -> Pass:
        """A sampler begins a new pass."""
        begun: Pass = vars(self._thread).pop("next", None) or Pass(self, delivers=False)
        begun.passed_over, self.passes_over = self.passes_over, 0
        self.rounds += 1
        self.recent = []
        self.at_start(begun)
        with self._lock:
            self._forget_old(begun)
            self._passes.append(begun)
        return begun

    def _forget_old(self, begun: Pass) -> None:
        """Draws of earlier passes that nobody can step on any more; all of them are accounted."""
        alive = self._alive()
        for earlier in self._passes[:-1]:
            if earlier.over:
                earlier.unreleased = {d: None for d in earlier.unreleased if d in alive}
        if not begun.delivers:  # the loader that was handing out another such pass is not heard of again
            for earlier in self._passes:
                earlier.unreleased = earlier.unreleased if earlier.delivers else {}
        self._passes = [p for p in self._passes if p is self._passes[-1] or p.unreleased or not p.over]
        self._open = {d: None for d in self._open if d.whole in d.of.unreleased}

    def close(self) -> None:
        """The training is over: what is delivered from now on is not of it."""
        self._closed, self.keeps, self.recent = True, 0, []
        self.at_start, self.at_end = lambda begun: None, lambda: None
        self.at_delivery = lambda batch, draw: None

    def hand_out(self, draw: Draw, batch: Any = None) -> None:
        """The loop gets a draw, or a part of one."""
        if self._closed:
            return
        with self._lock:
            draw.delivered = draw.whole.delivered = True
            draw.of.unreleased[draw.whole] = None
            self._open[draw] = None
            self._origins.add(batch, draw)
        if batch is not None:
            self._delivered(batch, draw)
        self._thread.drawn = None if draw.of.delivers else draw

    def collated(self, batch: Any) -> None:
        """A batch was made, in this thread, of what was drawn last for somebody else's loader.

        A draw before it in its pass of which no batch was made was passed over, its samples never read (a resumed loop skips the
        first batches of a pass): it is no release.
        """
        draw: Draw | None = vars(self._thread).pop("drawn", None)
        if draw is not None:
            with self._lock:
                self._origins.add(batch, draw)
                draw.made = True
                for earlier in [d for d in draw.of.unreleased if not d.made and d.number < draw.number]:
                    del draw.of.unreleased[earlier]
                    self._open.pop(earlier, None)
            self._delivered(batch, draw)

    def _delivered(self, batch: Any, draw: Draw) -> None:
        if self.keeps:
            self.recent = [*self.recent, (pytree.parts(batch), draw.samples, draw)][-self.keeps :]
        self.at_delivery(batch, draw)

    # ------------------------------------------------------------------ what the loop is working on

    def draw_of(self, tree: Any) -> Draw | None:
        """The draw whose delivered tensors or arrays, or views of them, are in a tree.

        Args:
            tree: arguments of a call, or any other nested containers.

        Returns:
            The draw, or the part of one, that was delivered with them; ``None`` if there is nothing of the kind.
        """
        return self._origins.find(tree)

    def work_on(self, draw: Draw | None) -> None:
        """The loop has called the private model with samples of this draw: the next step is made on it.

        Args:
            draw: as :meth:`draw_of` gave it; ``None`` if the call's origin is not known.
        """
        if draw is not None or (self._worked is not None and self._worked.stepped):
            self._worked = draw

    def work_on_rows(self, sizes: set[int]) -> None:
        """As :meth:`work_on`, of unknown origin, where samples have different numbers of rows.

        Args:
            sizes: what may be the number of all rows.

        Raises:
            ForeignBatchError: there are several such draws, whose samples have different numbers of rows.
        """
        fitting = [draw for draw in tuple(self._open) if sum(draw.counts) in sizes]
        if len({draw.counts for draw in fitting}) > 1:
            raise ForeignBatchError(*_untold("the model was called with a batch"), path="data_loader")
        self.work_on(fitting[0] if fitting else None)

    def present(self, rows: int | None = None) -> Draw | None:
        """The draw that the loop is working on, or the part of one.

        Args:
            rows: number of samples whose gradients have arrived, where it is known.

        Returns:
            The draw; ``None`` if there is none without a step.

        Raises:
            ForeignBatchError: parts of several draws may be meant, which must not be added up.
        """
        if self._worked is not None:
            return None if self._worked.stepped else self._worked
        still = tuple(self._open)
        fitting = [draw for draw in still if rows is not None and draw.fits(rows)]
        if any(draw.part_of for draw in fitting) and len({draw.whole for draw in fitting}) > 1:
            what = f"optimizer.step() has per-sample gradients of {rows} samples"
            raise ForeignBatchError(*_untold(what), path="data_loader")
        return next(iter(fitting or still), None)

    @property
    def varying(self) -> bool:
        """Whether a delivered draw has samples with different numbers of rows."""
        return any(draw.counts for draw in tuple(self._open))

    @property
    def counts(self) -> Counts:
        """Rows of every sample of the draw that the loop is working on; see :attr:`Draw.counts`."""
        draw = self.present()
        return () if draw is None else draw.counts

    def pending(self) -> int | None:
        """Number of samples in the draw (or part of one) that the loop is working on; ``None`` if there is none."""
        draw = self.present()
        return None if draw is None else draw.samples

    def settle(self, draw: Draw, *, released: bool = True) -> None:
        """A step has taken the gradients of a draw, or of a part of one; it cannot be used again.

        Args:
            draw: the draw.
            released: whether the whole draw was released with it.
        """
        with self._lock:
            self._worked = None
            draw.stepped = True
            self._open.pop(draw, None)
            if released:
                draw.whole.stepped = draw.whole.released = True
                draw.of.unreleased.pop(draw.whole, None)
                draw.of.latest = max(draw.of.latest, draw.number)
                self.position.released(draw.of)

    # ------------------------------------------------------------------ begun again

    def limit_to(self, most: int) -> None:
        """From now on, parts of draws have at most so many samples."""
        self.limit = most if self.limit is None else min(self.limit, most)

    def ask_again(self, part: Draw) -> bool:
        """A draw cannot be released with this part of it, and is to be delivered again from its start, in parts of the limit.

        Args:
            part: whose step was left out.

        Returns:
            Whether it will be; nothing more is delivered of a pass that is over.
        """
        with self._lock:
            draw = part.whole
            draw.begin_again()
            if part.of.over:
                draw.discarded = True
                return False
            part.of.asked.add(draw)
            return True

    def again(self, of: Pass) -> list[list[int]]:
        """The indices of the parts that the loader is to deliver next, because they were asked for again."""
        with self._lock:
            return of.again(self._open)

    # ------------------------------------------------------------------ delivered without a step

    def unaccounted(self) -> list[Draw]:
        """Poisson draws that were delivered and that the accountant has not counted yet."""
        with self._lock:
            return [d for p in self._passes for d in p.accountable() if d.accounted is None]

    def forget_accounted(self) -> None:
        """In a process that was forked: what was counted in the first one is not counted here."""
        with self._lock:
            for p in self._passes:
                p.accounted = None
                for draw in p.unreleased:
                    draw.accounted = None

    def steppable(self, of: Pass) -> list[Draw]:
        """Delivered draws of a pass that are not released and may still be: something of their batches is left."""
        with self._lock:
            alive = self._alive()
            return [draw for draw in of.unreleased if draw in alive and not draw.discarded]

    def skipped(self, passes: int = 0) -> list[Draw]:
        """Delivered draws on which no step will be made: their pass is over, and nothing of their batches is left.

        Args:
            passes: leave out so many of the last passes.

        Returns:
            The Poisson draws.
        """
        with self._lock:
            alive = self._alive()
            over = [p for p in self._passes[: len(self._passes) - passes] if p.over]
            return [draw for p in over for draw in p.unreleased if draw not in alive]

    def _alive(self) -> set[Draw]:
        return {draw.whole for draw in self._origins.alive() if draw is not None}


def _untold(what: str) -> tuple[str, str, str]:
    return (
        f"{what}, and it cannot be told of which draw: several that the data_loader has delivered fit.",
        "Rows of one draw must not be taken for those of another.",
        "Make a step for every batch of the data_loader, in their order, or call the model with the very tensors of the batch.",
    )

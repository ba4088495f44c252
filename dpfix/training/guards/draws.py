"""One step per Poisson draw, with the rows that were drawn."""

from __future__ import annotations

from typing import Any

import torch
from opacus.optimizers import DPOptimizer
from torch import nn
from typing_extensions import override

from dpfix.errors import AccumulationError, ForeignBatchError, MisuseError
from dpfix.instrument import pytree
from dpfix.sampling.draw import Draw
from dpfix.sampling.ledger import DrawLedger
from dpfix.sampling.one_pass import Pass
from dpfix.training.guards.check import Check, Guarded


class DrawOfCall:
    """Stands among the hooks of a model in private training and tells the ledger with which draw the model is called.

    In a copy of the model, or a pickled one, it knows no ledger and does nothing.

    Args:
        ledger: the ledger.
    """

    def __init__(self, ledger: DrawLedger | None = None) -> None:
        self.ledger = ledger

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """The model is called."""
        if self.ledger is None or not torch.is_grad_enabled():
            return
        draw = self.ledger.draw_of((args, kwargs))
        if draw is None and self.ledger.varying:
            self.ledger.work_on_rows({n for t in pytree.tensors((args, kwargs)) for n in t.shape})
        else:
            self.ledger.work_on(draw)

    def __reduce__(self) -> Any:
        return DrawOfCall, ()


class CalledDraw(Check):
    """The draw that the model is called with is the one that the next step is made on.

    Catches: gradients of one draw released as another's, in loops that look ahead, shuffle batches or leave some out. Costs: a
    look at the arguments of a call with gradient.
    """

    def __init__(self, guarded: Guarded) -> None:
        self.needed = guarded.ledger is not None
        hook = DrawOfCall(guarded.ledger)
        self._handle = (
            guarded.module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True) if self.needed else None
        )

    @override
    def detach(self) -> None:
        if self._handle is not None:
            self._handle.remove()


class WholeDraws(Check):
    """A release is made of one draw, and of all parts of it that a ``BatchMemoryManager`` delivers.

    Catches: parts of two draws released as one. Costs: a look into the ledger.

    Attributes:
        complete: whether the step that is being made completes its draw.
        summed: the draw of which parts are in the sum, or were last.
    """

    def __init__(self, guarded: Guarded) -> None:
        self._guarded = guarded
        self.summed: Draw | None = None
        self._times = 0  # that it had been begun again by then
        self.complete = True

    def turn_to_present(self, counts: list[int] | None = None) -> int | None:
        """Find out which draw the step is made on.

        Args:
            counts: number of samples of every backward pass since the last step, once that is known.

        Returns:
            Number of samples in the draw, or in the part of it; ``None`` if there is none.
        """
        guarded, ledger = self._guarded, self._guarded.ledger
        draw = None if ledger is None else ledger.present(counts[0] if counts else None)
        guarded.progress.draw = draw
        guarded.accounting.new_step(None if draw is None else draw.whole)
        self.complete = draw is None or draw.completes
        return None if draw is None else draw.samples

    def begin_pass(self, optimizer: Any, begun: Pass) -> None:
        """A new pass over the loader begins.

        With a loader that is not the private one, what a batch manager had signalled for the pass before is forgotten.

        Args:
            optimizer: the private optimizer.
            begun: the pass.
        """
        accounting = self._guarded.accounting
        accounting.complete()
        accounting.name_skipped(passes=1)
        if not begun.delivers:
            optimizer._step_skip_queue.clear()
            optimizer._is_last_step_skipped = False
            self._discard()

    @override
    def collected(self, optimizer: DPOptimizer, counts: list[int], drawn: int | None) -> None:
        draw = self._guarded.progress.draw
        if draw is None:
            return
        if draw.whole.discarded or draw.whole.released:
            raise ForeignBatchError(
                f"optimizer.step() has a part of a draw ({draw.number} of its pass) of which other parts were given up, when "
                "the loop went on to another draw of the data_loader or a step failed.",
                "A draw is released as a whole or not at all.",
                "Go on with the next draw, and make a step for every batch of a BatchMemoryManager, in their order.",
                path="data_loader",
            )
        if self._guarded.progress.partial and (draw.whole, draw.whole.times) != (self.summed, self._times):
            self._discard()
        self.summed, self._times = draw.whole, draw.whole.times

    @override
    def take_over(self, earlier: WholeDraws) -> None:
        self.summed, self._times = earlier.summed, earlier._times

    def _discard(self) -> None:
        """Drop the sum of a draw that is not complete."""
        guarded, draw = self._guarded, self.summed
        if not guarded.progress.partial:
            return
        begun_again = draw is not None and draw.times != self._times
        if draw is not None:
            draw.discarded |= not begun_again
        guarded.progress.partial = 0
        guarded.forget_sum()
        if begun_again:
            return
        guarded.accounting.warn(
            "a BatchMemoryManager loop was left inside a logical batch, or skipped a part of one: the draw is accounted, and the "
            "part that was summed up so far is discarded. Make a step for every batch, up to the end of a logical batch."
        )

    @override
    def after_step(self, released: bool) -> None:
        draw, ledger = self._guarded.progress.draw, self._guarded.ledger
        if draw is None or ledger is None:
            return
        if draw.part_of is not None and not draw.given_up:
            draw.part_of.summed += draw.samples
        if released or draw.part_of is not None:
            ledger.settle(draw, released=released)


class OneBackward(Check):
    """With Poisson sampling, one backward pass comes before a step.

    Catches: several draws released as one. Costs: a length.
    """

    def __init__(self, guarded: Guarded) -> None:
        self._sampled = guarded.ledger is not None

    @override
    def collected(self, optimizer: DPOptimizer, counts: list[int], drawn: int | None) -> None:
        if self._sampled and len(counts) > 1:
            raise AccumulationError(
                f"optimizer.step() after {len(counts)} backward passes with Poisson sampling:",
                "every draw is accounted as one step.",
                "Call optimizer.zero_grad() and step() for every batch of the returned data_loader, add losses of one batch "
                "before one backward(), or use opacus.utils.batch_memory_manager.",
                path="optimizer",
            )


class NewDraw(Check):
    """With Poisson sampling, every step has a draw of its own.

    Catches: the original loader in the loop, and several steps with one batch. Costs: a look into the ledger.
    """

    def __init__(self, guarded: Guarded) -> None:
        self._ledger = guarded.ledger

    @override
    def collected(self, optimizer: DPOptimizer, counts: list[int], drawn: int | None) -> None:
        if drawn is None and self._ledger is not None:
            raise ForeignBatchError(
                "optimizer.step() without a new batch of the returned data_loader: the loop iterates over the original "
                "loader, or makes several steps with one batch.",
                "The accountant assumes one Poisson draw per step.",
                "Iterate over the data_loader that make_private_safe returned, one step per batch.",
                path="data_loader",
            )


class SomethingArrived(Check):
    """Per-sample gradients have arrived, unless nothing was drawn.

    Catches: a step without a backward pass, and gradients that the engine was not asked for. Costs: a look at a list.
    """

    @override
    def collected(self, optimizer: DPOptimizer, counts: list[int], drawn: int | None) -> None:
        if not counts and drawn != 0:
            raise MisuseError(
                "optimizer.step(): no per-sample gradient has arrived.",
                help="Call loss.backward() on a loss of the private model before step(), with the model in training mode, and "
                "do not call zero_grad() in between. A loop that computes per-sample gradients itself needs "
                "grad_sample_mode='no_op' and torch.func (functional_call, vmap and grad, which replaced "
                "functorch.make_functional), or dpfix.per_sample_gradients.",
                path="optimizer",
            )


class DrawnRows(Check):
    """With Poisson sampling, as many samples have arrived as were drawn.

    Catches: rows filtered, repeated or taken from elsewhere. Costs: two comparisons.
    """

    def __init__(self, guarded: Guarded) -> None:
        self._progress = guarded.progress

    @override
    def collected(self, optimizer: DPOptimizer, counts: list[int], drawn: int | None) -> None:
        draw = self._progress.draw
        if not drawn or draw is None:
            return
        part = draw.part_of is not None  # else somebody else may have signalled that more of it follows
        rows = counts[0] if part else self._progress.partial + counts[0]
        last = part or not optimizer._check_skip_next_step(pop_next=False)
        if rows > drawn or (last and rows != drawn):
            raise ForeignBatchError(
                f"optimizer.step() has per-sample gradients of {rows} samples, but the data_loader drew {drawn}.",
                "Rows of the batch are not the drawn samples (filtered, repeated, or from another loader).",
                "Train on the batches of the returned data_loader as they are. Fakes for a discriminator have to be as many as "
                "the batch has samples; dpfix.integrations.monai.PrivacyHandler sees to it in a GanTrainer.",
                path="data_loader",
            )

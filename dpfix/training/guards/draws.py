"""One step per Poisson draw, with the rows that were drawn."""

from __future__ import annotations

from opacus.optimizers import DPOptimizer
from typing_extensions import override

from dpfix.errors import AccumulationError, ForeignBatchError, MisuseError
from dpfix.training.guards.check import Check, Guarded


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

    @override
    def after_step(self, released: bool) -> None:
        if released and self._ledger is not None:
            self._ledger.settle()


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
        if not drawn:
            return
        rows = self._progress.partial + counts[0]
        last = not optimizer._check_skip_next_step(pop_next=False)
        if rows > drawn or (last and rows != drawn):
            raise ForeignBatchError(
                f"optimizer.step() has per-sample gradients of {rows} samples, but the data_loader drew {drawn}.",
                "Rows of the batch are not the drawn samples (filtered, repeated, or from another loader).",
                "Train on the batches of the returned data_loader as they are.",
                path="data_loader",
            )

"""The loop's loss couples no samples, where nobody has told it before."""

from __future__ import annotations

from opacus.optimizers import DPOptimizer
from typing_extensions import override

from dpfix.engines import engine_of
from dpfix.training.guards.check import Check, Guarded
from dpfix.training.loss_proof import LossProof


class UncoupledLoss(Check):
    """The loss that the loop computes couples no samples; proven on the first real steps.

    Catches: a loss in which one sample's share depends on the others, or of another reduction than was announced. Costs:
    nothing where the loss is known, else a few forward and backward passes of the loss on the first steps; then nothing.
    """

    def __init__(self, guarded: Guarded) -> None:
        plan, handle = guarded.plan, guarded.handle
        self.needed = engine_of(plan).audited and not plan.loss_known
        self._proof = LossProof(guarded.module, plan, handle.paused) if self.needed else None

    @override
    def cleared(self) -> None:
        if self._proof is not None:
            self._proof.clear()
            self._proof = None if self._proof.done else self._proof

    @override
    def before_step(self, optimizer: DPOptimizer) -> None:
        if self._proof is not None:
            self._proof.before_step()

    @override
    def after_step(self, released: bool) -> None:
        self.cleared()

    @override
    def detach(self) -> None:
        if self._proof is not None:
            self._proof.remove()

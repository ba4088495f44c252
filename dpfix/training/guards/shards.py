"""A model that is spread over processes holds its shards while a step is made."""

from __future__ import annotations

from opacus.optimizers import DPOptimizer
from typing_extensions import override

from dpfix.instrument.sharded import hide_shards
from dpfix.training.guards.check import Check, Guarded


class ShardsHeld(Check):
    """The model holds the parameters that the optimizer has; what a real step needs of whole ones is given up after it.

    Catches: nothing by itself; after an evaluation FSDP leaves whole parameters on the model, which the optimizer does not
    move, and with which the next step would be computed. Costs: nothing on models that are not spread over processes.
    """

    def __init__(self, guarded: Guarded) -> None:
        self._guarded = guarded
        self.needed = guarded.shards is not None

    @override
    def cleared(self) -> None:
        if self._guarded.shards is not None:
            self._guarded.shards.clear()

    @override
    def before_step(self, optimizer: DPOptimizer) -> None:
        hide_shards(self._guarded.module)

    @override
    def after_step(self, released: bool) -> None:
        if self._guarded.shards is not None:
            self._guarded.shards.forget_values()

    @override
    def detach(self) -> None:
        if self._guarded.shards is not None:
            hide_shards(self._guarded.module)
            self._guarded.shards.detach()

    @override
    def make_way(self) -> None:
        """The model stays spread."""

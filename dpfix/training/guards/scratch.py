"""Nothing of a batch stays on the model."""

from __future__ import annotations

from typing_extensions import override

from dpfix.instrument.module_state import Scratch
from dpfix.training.guards.check import Check, Guarded


class ScratchPutBack(Check):
    """Attributes that every forward pass overwrites are put back after the step.

    Catches: values of a batch that would leave with the model. Costs: a comparison per such attribute; most models have none.
    """

    def __init__(self, guarded: Guarded) -> None:
        self._scratch = Scratch(guarded.module, guarded.plan.scratch)
        self.needed = bool(guarded.plan.scratch)

    @override
    def after_step(self, released: bool) -> None:
        self._scratch.put_back()

    @override
    def detach(self) -> None:
        self._scratch.put_back()

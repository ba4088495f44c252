"""The budget of the data allows the release."""

from __future__ import annotations

from opacus.optimizers import DPOptimizer
from typing_extensions import override

from dpfix.errors import BudgetError
from dpfix.training.guards.check import Check, Guarded


class WithinBudget(Check):
    """What is about to be released is written in the file of the budget, and does not go beyond it.

    Catches: a step for which the budget is spent, by this training or by others on the same data. Costs: without a budget
    nothing; with one a look at a few numbers, and on one step in a block (see :mod:`dpfix.training.budget`) the writing of a
    small file.
    """

    def __init__(self, guarded: Guarded) -> None:
        self._guarded = guarded
        self.needed = guarded.accounting.spender is not None
        self._reserved = False

    @override
    def before_noise(self, optimizer: DPOptimizer) -> None:
        try:
            self._guarded.accounting.reserve(optimizer)
        except BudgetError:
            self._guarded.forget_sum()
            raise
        self._reserved = True

    @override
    def noised(self, optimizer: DPOptimizer) -> None:
        if not self._reserved:  # the script has put an add_noise of its own on the optimizer
            try:
                self.before_noise(optimizer)
            except BudgetError:
                for p in self._guarded.parameters.values():
                    p.grad = None
                raise
        self._reserved = False

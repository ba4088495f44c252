"""The accountant counts every release once, whatever the script attaches to the optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from opacus.optimizers import DPOptimizer

StepHook = Callable[[DPOptimizer], None]


class Accounting:
    """Counts every release once, also if the script attaches the accountant's hook again or replaces it.

    Costs one call per step.

    Args:
        optimizer: the private optimizer, with the accountant's step hook.
        accountant: Opacus's accountant.

    Attributes:
        at_release: looks at what is about to be released, before it is counted.
    """

    def __init__(self, optimizer: DPOptimizer, accountant: Any) -> None:
        self._accountant = accountant
        self._account: StepHook = optimizer.step_hook  # type: ignore[assignment]
        self._counted = False
        self.at_release: Callable[[DPOptimizer], None] | None = None
        optimizer.step_hook = self.count

    def new_step(self) -> None:
        """The next release is another one."""
        self._counted = False

    def count(self, optimizer: DPOptimizer) -> None:
        """A batch is released."""
        if not self._counted:
            if self.at_release is not None:
                self.at_release(optimizer)
            self._counted = True
            self._account(optimizer)

    def before(self, hook: StepHook) -> StepHook:
        """A step hook that counts the step, and then does what the script wants; Opacus's optimizers keep one hook only."""

        def both(optimizer: DPOptimizer) -> None:
            self.count(optimizer)
            hook(optimizer)

        return both

    @property
    def steps(self) -> int:
        """Steps that the accountant has counted."""
        return accounted_steps(self._accountant)


def accounted_steps(accountant: Any) -> int:
    """Steps in the history of one of Opacus's accountants."""
    return sum(entry[-1] for entry in accountant.history)

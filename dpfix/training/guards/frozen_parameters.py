"""Parameters that no gradient reached when the step was checked stay without gradient, or are trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from opacus.optimizers import DPOptimizer
from typing_extensions import override

from dpfix.engines.frozen_parameters import Arrivals
from dpfix.errors import PlanBrokenError
from dpfix.training.guards.check import Check, Guarded

LeavesOut = Callable[[Any, Callable[[], None]], None]
HELP = "Pass a training_step that uses all parts of the model to make_private_safe to have them trained from the first."


class FrozenUnreached(Check):
    """No gradient reaches a parameter that is frozen because none had reached it when the step was checked.

    Catches: a loop that begins to use a part of the model, which would never be trained, without a word. Costs: nothing
    where every parameter is trained; else a look at these parameters per call of the model.

    Attributes:
        names: parameters that gradient has reached since the last step.
        trains: leaves out such a step and has the parameters trained from then on, where that can be done; else the step is
            refused. Takes the optimizer and what ends the step.
    """

    def __init__(self, guarded: Guarded) -> None:
        frozen = guarded.plan.frozen_parameters
        self.needed = bool(frozen)
        self._name = guarded.name
        self.trains: LeavesOut | None = None
        self._arrivals = Arrivals(guarded.module, frozen)
        self.names = self._arrivals.names

    @property
    def leaves_out(self) -> LeavesOut | None:
        """What leaves out the step that is being made, if it is to be."""
        return self.trains if self.names else None

    @property
    def fact(self) -> str:
        """What has happened."""
        names = sorted(self.names)
        shown = ", ".join(f"`{name}`" for name in names[:3]) + (", ..." if len(names) > 3 else "")
        return (
            f"gradient reached {shown} of {self._name}, which none had reached when the step was checked; they are frozen "
            "until now."
        )

    @override
    def cleared(self) -> None:
        self.names.clear()

    @override
    def before_step(self, optimizer: DPOptimizer) -> None:
        if self.names:
            raise self.refusal("They would go on untrained. No parameter has moved in this step.")

    def refusal(self, why: str) -> PlanBrokenError:
        """The error that names what gradient has reached.

        Args:
            why: why they cannot be trained.

        Returns:
            The error.
        """
        return PlanBrokenError(self.fact, why, HELP, path=min(self.names))

    @override
    def after_step(self, released: bool) -> None:
        self.names.clear()

    @override
    def detach(self) -> None:
        self._arrivals.detach()

"""No gradient comes back to calls that run without a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from typing_extensions import override

from dpfix.engines.base import zeros
from dpfix.engines.no_grad_regions import NoGradRegions
from dpfix.errors import PlanBrokenError
from dpfix.instrument.source import warn_user
from dpfix.plan import Region
from dpfix.training.guards.check import Check, Guarded


class RegionsUntouched(Check):
    """No gradient reaches the output of a no-grad region; a step in which one does is left out.

    Catches: a loop that uses what a region returns in a way that the probe did not show. Costs: a look at a list; the
    regions themselves count their calls.

    Attributes:
        plan: how the model is being trained: a region that gradient has reached is no longer in it.
    """

    def __init__(self, guarded: Guarded) -> None:
        self._guarded = guarded
        self._regions = NoGradRegions(guarded.module, guarded.plan.no_grad_regions)
        self.plan = guarded.plan
        self.needed = bool(guarded.plan.no_grad_regions)

    def drop(self, regions: Iterable[Region]) -> None:
        """From now on these calls are ordinary ones."""
        for region in regions:
            self._regions.drop(region)
        self.plan = replace(self.plan, no_grad_regions=self._regions.regions)

    def leaves_out(self, optimizer: Any, settle: Callable[[], None]) -> bool:
        """Whether gradient reached the output of a no-grad region, so that this step cannot be applied.

        Nothing is released. The draw is counted by the accountant, since what the loop does may depend on it. From the
        next step on the call is an ordinary one.

        Args:
            optimizer: the private optimizer.
            settle: ends the step, as if its batch had been released.

        Returns:
            Whether the step is left out.

        Raises:
            PlanBrokenError: that happened inside a logical batch of a ``BatchMemoryManager``, or on one of several ranks.
        """
        if not self._regions.tripped:
            return False
        tripped = list(dict.fromkeys(self._regions.tripped))
        self.drop(tripped)
        site = tripped[0].site
        fact = (
            f"gradient reached the output of `{site.path or 'the model'}` ({site.line or 'called by the loop'}), a call that "
            "ran without a graph because no gradient came back to it when it was checked."
        )
        told = LeftOut(fact, "The call is an ordinary one from the next step on", _WAY_OUT, site.path)
        leave_out(self._guarded, optimizer, settle, told)
        return True

    @override
    def cleared(self) -> None:
        self._regions.reset()

    @override
    def after_step(self, released: bool) -> None:
        self._regions.reset()

    @override
    def detach(self) -> None:
        self._regions.detach()


_WAY_OUT = "Pass the training_step that the loop makes, or no_grad_regions=False, to make_private_safe."


@dataclass(frozen=True)
class LeftOut:
    """Why a step is left out, in words.

    Attributes:
        fact: what happened.
        then: what is so from the next step on.
        help: the way out.
        path: what it is about.
    """

    fact: str
    then: str
    help: str
    path: str


def leave_out(guarded: Guarded, optimizer: Any, settle: Callable[[], None], told: LeftOut) -> None:
    """Leave out a step: no parameter moves, and the accountant counts the draw, since what the loop does may depend on it.

    Args:
        optimizer: the private optimizer.
        settle: ends the step, as if its batch had been released.

    Raises:
        PlanBrokenError: that happened inside a logical batch of a ``BatchMemoryManager``, or on one of several ranks.
    """
    if guarded.ranks.size > 1:
        raise PlanBrokenError(
            told.fact, "One rank cannot leave out a step that the others make.", told.help, path=told.path
        )
    virtual = guarded.progress.partial or optimizer._check_skip_next_step(pop_next=False)
    guarded.forget_sum()
    for p in guarded.parameters.values():
        p.grad = None
        p.grad_sample = zeros(p, 0)  # type: ignore[attr-defined]
    settle()
    if optimizer.step_hook is not None:
        optimizer.step_hook(optimizer)
    if virtual:
        optimizer._step_skip_queue.clear()
        raise PlanBrokenError(
            told.fact,
            "This logical batch of the BatchMemoryManager is lost, nothing was released.",
            f"{told.then}: go on with the next logical batch. {told.help}",
            path=told.path,
        )
    warn_user(
        f"{told.fact} This step is not applied: no parameter has moved, and the accountant has counted the draw. {told.then}; "
        f"the loop has nothing to do. {told.help}"
    )

"""The first real step decides what could not be told before: which calls of the model the loop makes, and with which engine.

Where the call of dpfix had to guess, or could not, every real call of the model is looked at. One of a form that was not
audited is learnt and audited before it runs; then the engine is attached, and the call goes on under it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from dpfix.engines import engine_of
from dpfix.engines.base import Handle
from dpfix.engines.replaced import Replaced, is_recorded
from dpfix.errors import DPFixWarning, PlanBrokenError, TrainingStepError
from dpfix.instrument.function_modes import unfollowed
from dpfix.instrument.memento import Modes
from dpfix.instrument.rng import rng_untouched
from dpfix.instrument.turn import TURN
from dpfix.layout.calls import CallLayout, find_layout
from dpfix.observe.call_sources import Call, takes_from
from dpfix.plan import Plan
from dpfix.report.report import Report
from dpfix.sampling.ledger import DrawLedger
from dpfix.training.guards.frozen_parameters import HELP
from dpfix.training.guards.no_grad_regions import LeftOut, leave_out
from dpfix.training.step_guard import StepGuard


@dataclass(frozen=True)
class Decision:
    """What was decided on a real call.

    Attributes:
        plan: how the model is to be trained.
        report: what was found, changed and chosen.
    """

    plan: Plan
    report: Report


Decide = Callable[[Call, bool], "Decision | None"]
"""From a real call, and whether those that were audited before are the loop's too, to a decision; ``None`` if the next call
has to decide."""

MOST_FLAGS = 8
"""Combinations of flags in the model's arguments that are audited, at most."""


def put_to_work(module: nn.Module, plan: Plan, prepared: Any, ledger: DrawLedger | None) -> Handle:
    """Attach the engine of a plan to a model that Opacus has handed over.

    Args:
        prepared: Opacus's wrapper or hooks object.

    Returns:
        The engine at work.
    """
    handle = engine_of(plan).attach(module, plan, prepared)
    handle.several_iterations = ledger is None
    if ledger is not None:
        handle.counts = lambda: ledger.counts
    return handle


class RealCalls(Replaced):
    """Stands in for what ``module(...)`` does, hooks included, and looks at it first.

    A step costs one look at the arguments of every call.

    Args:
        module: the plain model.
        prepared: Opacus's wrapper or hooks object.
        optimizer: the private optimizer.
        decide: learns, audits and chooses.
        told: whether the call of dpfix has named the loop's step: only what comes back is looked at then.
    """

    name = "_call_impl"

    def __init__(self, module: nn.Module, prepared: Any, optimizer: Any, decide: Decide, told: bool = False) -> None:
        super().__init__(module)
        self._told = told
        self._latest: Any = ((), {})
        self.report: Report | None = None
        self._prepared, self._optimizer, self._decide = prepared, optimizer, decide
        self._next: Plan | None = None  # from the next step on
        self._confirmed = False  # whether the loop has made a call that was audited
        self._flags: set[Any] = set()
        self._guard.frozen.trains = self._come_back
        ledger = self._guard.guarded.ledger
        if ledger is not None and not (told and not self._guard.plan.frozen_parameters):
            ledger.keeps = 2  # a loader around the private one may be a batch ahead of the loop

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The call, by an engine that was audited for it."""
        if is_recorded(self.module):
            self._latest = args, kwargs
            with unfollowed():
                known = self._told or self._known(args, kwargs)
            if not known:
                with TURN, Modes():
                    self._learn(args, kwargs)
            self._confirmed = bool(self._plan.engine)
        return self.original(*args, **kwargs)

    @override
    def put_in(self) -> None:
        self.original = getattr(self.module, self.name)
        super().put_in()

    @override
    def take_out(self) -> None:
        if vars(self.module).get(self.name) is not self:
            return  # another training of the same model has begun, or it is out already
        super().take_out()

    @property
    def _guard(self) -> StepGuard:
        return self._optimizer.guard

    @property
    def _plan(self) -> Plan:
        return self._next or self._guard.plan

    def _known(self, args: Any, kwargs: Any) -> bool:
        """Whether a call has an audited form, and the samples that were drawn where that form has them."""
        flags = tuple((k, v) for k, v in (*enumerate(args), *kwargs.items()) if isinstance(v, (bool, str)))
        if flags not in self._flags and len(self._flags) < MOST_FLAGS:
            self._flags.add(flags)
            if flags:
                return False
        layout, ledger = self._layout(args, kwargs), self._guard.guarded.ledger
        drawn = None if ledger is None or not ledger.recent else ledger.pending()
        if layout is None or drawn is None or self._plan.row_counter:
            return layout is not None
        rows = layout.rows(args, kwargs)
        return rows in {None, max(1, drawn)} or rows == self._call(args, kwargs).samples

    def _call(self, args: Any, kwargs: Any) -> Call:
        """A call, with the batch that is known to be in it, or else the newest of which it has something."""
        ledger, draws = self._guard.guarded.ledger, self._guard.real_steps.draws_of((args, kwargs))
        recent = ledger.recent[::-1] if ledger is not None else []
        known = [batch for batch in recent if batch[2] in draws] if len(draws) == 1 else []
        calls = [Call(args, kwargs, *batch[:2]) for batch in known or recent]
        found = (call for call in calls if takes_from(call))
        return next(found, calls[0] if calls else Call(args, kwargs, (), None))

    def _layout(self, args: Any, kwargs: Any) -> CallLayout | None:
        return find_layout(self._plan.calls, args, kwargs) if self._plan.engine else None

    def _learn(self, args: Any, kwargs: Any) -> None:
        """Decide on a call that was not audited.

        Raises:
            TrainingStepError: it cannot be told, or fails on the probe. Other refusals are those of the call of dpfix.
                Everything is as it was before.
        """
        guard, looking = self._guard, self._guard.guarded.handle.busy or self._next is not None
        guard.check_unchanged(self._optimizer)
        with unfollowed():
            audited, call = self._layout(args, kwargs) is not None, self._call(args, kwargs)
        self.take_out()
        guard.make_way()
        before, sums = self._plan, _sums(self.module)
        frozen(self.module, before, False)
        plan = before
        try:
            decision = self._decide(call, self._confirmed)
            if decision is not None:
                plan, self.report = decision.plan, decision.report
        except TrainingStepError:
            if not audited:
                raise
            # an audited form with other rows than were drawn, which the step is going to refuse
        finally:
            frozen(self.module, plan, True)
            for p, total in sums.items():
                p.summed_grad, p.grad_sample = total, None  # type: ignore[attr-defined]
            if looking and plan is not before:
                self._next = plan
                self._go_on(replace(plan, engine="", no_grad_regions=()))
                self._guard.leaves_out = self._leave_out
            else:
                self._go_on(plan)

    def _come_back(self, optimizer: Any, settle: Callable[[], None]) -> None:
        """The step in which gradient reached parameters that are frozen, since the check had shown none.

        Raises:
            PlanBrokenError: they cannot be trained as the loop does it.
        """
        guard, names = self._guard, {*self._guard.frozen.names}
        refusal = guard.frozen.refusal(
            "The call of the model does not show how they are used. No parameter has moved in this step."
        )
        told = LeftOut(guard.frozen.fact, "They are trained from the next step on", HELP, min(names))
        before = self._plan
        failed: Exception | None = None
        try:
            leave_out(guard.guarded, optimizer, settle, told)
        except (DPFixWarning, PlanBrokenError) as error:  # an error by the script's own filter, or a lost logical batch
            failed = error
        with TURN, Modes():
            self._learn(*self._latest)
        if failed is not None:
            raise failed
        if self._plan is not before and names & {*self._plan.frozen_parameters}:
            raise refusal

    def _leave_out(self, optimizer: Any, settle: Callable[[], None]) -> None:
        """The step in which the calls were seen for the first time; earlier ones of it were made under another engine."""
        plan, self._next = self._plan, None
        name = type(self.module).__name__
        told = LeftOut(
            f"the loop calls {name} in several ways in one step, which this step has shown.",
            "All of them are audited and followed from the next step on",
            "Pass the training_step that the loop makes to make_private_safe to have them audited there.",
            "training_step",
        )
        try:
            leave_out(self._guard.guarded, optimizer, settle, told)
        finally:
            self.take_out()
            self._guard.make_way()
            self._go_on(plan)

    def _go_on(self, plan: Plan) -> None:
        """A new guard and the engine of a plan, with what the old guard knew about the training."""
        earlier, old = self._guard, self._guard.guarded
        following = earlier.real_steps.following
        if plan is not earlier.plan:  # what the loop does is told by its calls, one by one
            following = replace(following, step=None)
        with rng_untouched():
            handle = put_to_work(self.module, plan, self._prepared, old.ledger)
            trained = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
            guarded = replace(old, plan=plan, parameters=trained, handle=handle)
            guard = StepGuard(guarded, self._optimizer, following, earlier)
        for holder in (self._prepared, self._optimizer):
            holder.__dict__["guard"] = guard
        self._guard.frozen.trains = self._come_back
        self.put_in()


def frozen(module: nn.Module, plan: Plan, value: bool) -> None:
    """Freeze the parameters that a plan says no gradient reaches, or train them again."""
    for name in plan.frozen_parameters:
        module.get_parameter(name).requires_grad_(not value)


def _sums(module: nn.Module) -> dict[nn.Parameter, Any]:
    """What Opacus expects of every parameter: the clipped sum of the present logical batch so far."""
    return {p: getattr(p, "summed_grad", None) for p in module.parameters()}

"""The first real step decides what could not be told before: which calls of the model the loop makes, and with which engine.

Where the call of dpfix had to guess, or could not, every real call of the model is looked at. One of a form that was not
audited is learnt and audited before it runs; then the engine is attached, and the call goes on under it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

from torch import nn
from typing_extensions import override

from dpfix.engines import engine_of
from dpfix.engines.base import Handle
from dpfix.engines.replaced import Replaced, is_recorded
from dpfix.errors import TrainingStepError
from dpfix.instrument.rng import rng_untouched
from dpfix.layout.calls import CallLayout, find_layout
from dpfix.observe.call_sources import Call
from dpfix.plan import Plan
from dpfix.report.report import Report
from dpfix.sampling.ledger import DrawLedger
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


Decide = Callable[[Call], "Decision | None"]
"""From a real call to a decision; ``None`` if the next call has to decide."""


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
    """

    name = "_call_impl"

    def __init__(self, module: nn.Module, prepared: Any, optimizer: Any, decide: Decide) -> None:
        super().__init__(module)
        self.report: Report | None = None
        self._prepared, self._optimizer, self._decide = prepared, optimizer, decide
        self._keep_batches()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The call, by an engine that was audited for it."""
        if is_recorded(self.module) and not self._known(args, kwargs):
            self._learn(args, kwargs)
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
        if not isinstance(self.original, MethodType):
            vars(self.module)[self.name] = self.original  # what this one stood in for is at work still

    def _keep_batches(self) -> None:
        ledger = self._guard.guarded.ledger
        if ledger is not None:
            ledger.keeps = True

    @property
    def _guard(self) -> StepGuard:
        return self._optimizer.guard

    def _known(self, args: Any, kwargs: Any) -> bool:
        """Whether a call has an audited form, and the samples that were drawn where that form has them."""
        plan, ledger = self._guard.plan, self._guard.guarded.ledger
        layout = self._layout(args, kwargs)
        drawn = ledger.pending() if ledger is not None and ledger.delivered else None
        if layout is None or drawn is None or plan.row_counter:
            return layout is not None
        return layout.rows(args, kwargs) in (None, max(1, drawn))

    def _layout(self, args: Any, kwargs: Any) -> CallLayout | None:
        plan = self._guard.plan
        return find_layout(plan.calls, args, kwargs) if plan.engine else None

    def _learn(self, args: Any, kwargs: Any) -> None:
        """Decide on a call that was not audited.

        Raises:
            DPFixError: it is refused; everything is as it was before the call.
        """
        guard = self._guard
        guarded = guard.guarded
        if guarded.handle.busy:
            return  # the engine says that it does not know this call
        guard.check_unchanged(self._optimizer)
        audited, ledger = self._layout(args, kwargs) is not None, guarded.ledger
        call = Call(args, kwargs, ledger.delivered if ledger else (), ledger.pending() if ledger else None)
        self.take_out()
        guard.detach()
        plan, sums = guard.plan, _sums(self.module)
        frozen(self.module, plan, False)
        decision = None
        try:
            decision = self._decide(call)
        except TrainingStepError:
            if not audited:
                raise
            # an audited form with other rows than were drawn, which the step is going to refuse
        finally:
            if decision is None:
                frozen(self.module, plan, True)
            else:
                plan, self.report = decision.plan, decision.report
            for p, total in sums.items():
                p.summed_grad, p.grad_sample = total, None  # type: ignore[attr-defined]
            self._go_on(plan)

    def _go_on(self, plan: Plan) -> None:
        """A new guard and the engine of a plan, with what the old guard knew about the training."""
        old = self._guard.guarded
        with rng_untouched():
            handle = put_to_work(self.module, plan, self._prepared, old.ledger)
            trained = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
            guarded = replace(old, plan=plan, parameters=trained, handle=handle)
            guard = StepGuard(guarded, self._optimizer, self._guard.called)
        for holder in (self._prepared, self._optimizer):
            holder.__dict__["guard"] = guard
        self.put_in()


def frozen(module: nn.Module, plan: Plan, value: bool) -> None:
    """Freeze the parameters that a plan says no gradient reaches, or train them again."""
    for name in plan.frozen_parameters:
        module.get_parameter(name).requires_grad_(not value)


def _sums(module: nn.Module) -> dict[nn.Parameter, Any]:
    """What Opacus expects of every parameter: the clipped sum of the present logical batch so far."""
    return {p: getattr(p, "summed_grad", None) for p in module.parameters()}

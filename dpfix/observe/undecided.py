"""A training whose first real call is to show what cannot be told from one batch."""

from __future__ import annotations

from dpfix.engines import BY_NAME, UNDECIDED
from dpfix.observe.training_step import UnknownCallError
from dpfix.plan import Plan
from dpfix.repair.lazy import is_lazy
from dpfix.report.finding import Finding
from dpfix.rules.batch_norm import fixed_norms
from dpfix.sampling.ranks import ALONE
from dpfix.scan.clipping import scheme_of
from dpfix.scan.request import Request


def may_wait(request: Request) -> bool:
    """Whether the first real call may decide what cannot be told before: nothing of that is needed for the hand-off."""
    return request.training_step is None and may_decide_again(request)


def may_decide_again(request: Request) -> bool:
    """Whether a real call may decide anew how the model is trained."""
    mode, privacy = request.performance.grad_sample_mode, request.privacy
    return (
        request.ranks == ALONE
        and (mode == "auto" or (BY_NAME[mode].audited and not BY_NAME[mode].attached_by_opacus))
        and not isinstance(privacy.max_grad_norm, dict)  # by parameters that are trained
        and privacy.augmentation is None
        and not is_lazy(request.module)
    )


def undecided(request: Request) -> Plan:
    """The plan until then."""
    return Plan(
        opacus_mode=UNDECIDED.opacus_mode,
        loss_reduction=request.privacy.loss_reduction,
        loss_known=False,
        batch_first=request.performance.batch_first,
        fixed_norms=fixed_norms(request.scan),
        own_engines=True,
        clipping=scheme_of(request),
    )


def decided_later(request: Request, unknown: UnknownCallError) -> Finding:
    """What the report says until then."""
    reason = unknown.findings[0]
    return Finding.advice(
        "DPF043",
        f"how the loop calls {type(request.module).__name__} cannot be told from one batch: {reason.fact} {reason.why}",
        "the first real call shows it; everything is proven there, before a parameter moves.",
        help="pass training_step= to have it proven in the call of dpfix already.",
        path="training_step",
    )

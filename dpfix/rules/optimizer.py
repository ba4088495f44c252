from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from dpfix.errors import OptimizerError
from dpfix.report.finding import Finding, Severity
from dpfix.rules.rule import Rule
from dpfix.scan.scan import Scan


class OptimizerFits(Rule):
    """The optimizer has to hold exactly the trainable parameters of the model, once each.

    What: parameters that are foreign to the model, missing from the optimizer or in two groups; optimizers that evaluate
    the loss several times per step (LBFGS), make a step in several calls (SAM) or need sparse gradients (SparseAdam).

    Why bad: a foreign parameter has no per-sample gradient; a trainable parameter outside the private optimizer gets its
    raw gradient, un-noised, from whoever steps it; in two groups it is moved twice by one noisy gradient. A closure
    optimizer releases many gradients of one batch while the accountant counts one step.

    Example: an optimizer built before ``ModuleValidator.fix``, which returns a copy of the model.

    Use instead: one optimizer over ``[p for p in model.parameters() if p.requires_grad]``. Two that share the model, such as
    Muon for matrices and AdamW for the rest, are one as ``dpfix.JoinedOptimizer(first, second)``. Any other optimizer is used
    as it is, since it only sees the noisy gradient: fused Adam, quantised states, schedule-free averaging.
    """

    title = "the optimizer does not fit the model"
    error = OptimizerError
    severity = Severity.BREAKS_GUARANTEE

    @override
    def find(self, scan: Scan) -> Iterator[Finding]:
        kind = type(scan.optimizer).__name__
        if isinstance(scan.optimizer, torch.optim.LBFGS):
            yield self.refusal(
                f"optimizer: {kind} evaluates the loss several times per step through a closure.",
                "every evaluation releases a gradient of the batch, and the accountant counts one.",
                "use a first-order optimizer (SGD, Adam, AdamW).",
                "optimizer",
            )
        elif calls := _further_steps(type(scan.optimizer)):
            yield self.refusal(
                f"optimizer: {kind} makes a step in several calls ({', '.join(calls)}).",
                "each takes a gradient of the batch; what moves parameters before the noise is added (to a worst case, in SAM) "
                "is not covered, and the accountant counts one release.",
                "use the optimizer inside it (SGD, Adam, AdamW), or another whose step() takes one gradient as it is.",
                "optimizer",
            )
        elif _needs_closure(type(scan.optimizer)):
            yield self.refusal(
                f"optimizer: {kind}.step() needs a closure, to evaluate the loss itself.",
                "every evaluation releases a gradient of the batch, and the accountant counts one.",
                "use an optimizer whose step() takes the gradient as it is (SGD, Adam, AdamW).",
                "optimizer",
            )
        if isinstance(scan.optimizer, torch.optim.SparseAdam):
            yield self.refusal(
                f"optimizer: {kind} takes sparse gradients only.",
                "the noisy sum is dense: noise reaches every row.",
                "use Adam, and build the embedding without sparse=True.",
                "optimizer",
            )
        yield from self._membership(scan)

    def _membership(self, scan: Scan) -> Iterator[Finding]:
        held = [p for group in scan.optimizer.param_groups for p in group["params"]]
        counts = Counter(id(p) for p in held)
        names = scan.parameter_names
        foreign = [p for p in held if p not in names]
        if foreign:
            yield self.refusal(
                f"optimizer holds {len(foreign)} parameter(s) that are not in module "
                f"{type(scan.module).__name__}; the first has shape {tuple(foreign[0].shape)}.",
                "they have no per-sample gradient; they may belong to a copy of the model or to a second model.",
                "build the optimizer from this module's parameters, after any ModuleValidator.fix; put several "
                "models into one nn.ModuleDict.",
                "optimizer",
            )
        twice = [name for p, name in names.items() if counts[id(p)] > 1]
        if twice:
            yield self.refusal(
                f"optimizer holds parameter `{twice[0]}` more than once ({len(twice)} such parameters).",
                "one noisy gradient would move it twice.",
                "list every parameter in one group only.",
                "optimizer",
            )
        missing = [name for p, name in names.items() if p.requires_grad and not counts[id(p)]]
        if missing:
            shown = ", ".join(f"`{name}`" for name in missing[:3]) + (", ..." if len(missing) > 3 else "")
            yield self.refusal(
                f"optimizer lacks {len(missing)} trainable parameter(s) of the module: {shown}.",
                "stepped by another optimizer they would move by raw, un-noised gradients.",
                "add them to the optimizer before the call, or freeze them with requires_grad_(False); two optimizers that share "
                "the model (Muon beside AdamW) become one: optimizer = dpfix.JoinedOptimizer(first, second).",
                missing[0],
            )

    VALID = (
        lambda: _pair(lambda m: torch.optim.Adam(m.parameters())),
        lambda: _pair(
            lambda m: torch.optim.SGD([{"params": m[0].parameters()}, {"params": m[2].parameters()}], lr=0.1)
        ),
    )
    INVALID = (
        lambda: _pair(lambda m: _Sharpness(m.parameters(), lr=0.1)),
        lambda: _pair(lambda m: _Searching(m.parameters(), lr=0.1)),
        lambda: _pair(lambda m: torch.optim.LBFGS(m.parameters())),
        lambda: _pair(lambda m: torch.optim.SparseAdam(list(m.parameters()))),
        lambda: _pair(lambda m: torch.optim.SGD(m[0].parameters(), lr=0.1)),
        lambda: _pair(lambda m: torch.optim.SGD([*m.parameters(), nn.Parameter(torch.zeros(2))], lr=0.1)),
    )


def _further_steps(kind: type[Optimizer]) -> list[str]:
    """Public methods of an optimizer's class, besides ``step``, that are steps by their names (``first_step``)."""
    own = {*dir(kind)} - {*dir(Optimizer)}
    steps = {
        name for name in own if name.endswith("_step") and not name.startswith(("_", "get_", "set_", "reset_", "is_"))
    }
    return sorted(name for name in steps if inspect.isfunction(inspect.getattr_static(kind, name)))


def _needs_closure(kind: type[Optimizer]) -> bool:
    try:
        arguments = list(inspect.signature(kind.step).parameters.values())[1:]
    except (TypeError, ValueError):
        return False
    return any(a.default is a.empty and a.kind in (a.POSITIONAL_ONLY, a.POSITIONAL_OR_KEYWORD) for a in arguments[:1])


class _Sharpness(torch.optim.SGD):
    """A step to the worst case around, and back with the gradient from there (SAM)."""

    def first_step(self) -> None:
        pass

    def second_step(self) -> None:
        pass


class _Searching(torch.optim.SGD):
    def step(self, closure: Any) -> Any:  # type: ignore[override]
        return super().step(closure)


def _pair(build: Any) -> dict[str, Any]:
    module = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    return {"module": module, "optimizer": build(module)}

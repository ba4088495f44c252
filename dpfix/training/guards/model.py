"""The model and the optimizer's groups are those that were audited."""

from __future__ import annotations

import operator
from itertools import chain

import torch
from opacus.optimizers import DPOptimizer
from torch import nn
from typing_extensions import override

from dpfix.errors import PlanBrokenError
from dpfix.plan import switched_on
from dpfix.training.guards.check import Check, Guarded

_VALUES = operator.methodcaller("values")
_TRAINED = operator.attrgetter("requires_grad")


class SameStructure(Check):
    """Every module and parameter is the same object, trained or frozen as it was audited.

    Catches: a layer replaced, added or removed, a parameter frozen, unfrozen or tied. Costs: one walk over modules and
    parameters, made by ``map`` over functions of ``operator``: a step of a small model takes as long as a few thousand
    lines of Python.
    """

    def __init__(self, guarded: Guarded) -> None:
        self._guarded = guarded
        modules = list(guarded.module.modules())
        self._holders = [h for m in modules for h in (m._modules, m._parameters) if h]
        self._sizes = list(map(len, self._holders))
        self._things = list(chain.from_iterable(map(_VALUES, self._holders)))
        self._parameters = list(guarded.module.parameters())
        self._flags = list(map(_TRAINED, self._parameters))
        self._names = _named(guarded.module)

    @override
    def before_step(self, optimizer: DPOptimizer) -> None:
        if self._unchanged():
            return
        changed = self._changes()
        raise PlanBrokenError(
            f"{changed[0]} of {self._guarded.name} was replaced, added, frozen or unfrozen after make_private_safe "
            f"({len(changed)} such change(s)), so its gradients are not the audited ones.",
            help="Change the model first and call make_private_safe again.",
            path=changed[0].partition("`")[2].rstrip("`"),
        )

    def _unchanged(self) -> bool:
        with torch._C.DisableTorchFunction():  # no mode has to hear of it
            return (
                list(map(len, self._holders)) == self._sizes
                and all(map(operator.is_, chain.from_iterable(map(_VALUES, self._holders)), self._things))
                and list(map(_TRAINED, self._parameters)) == self._flags
            )

    def _changes(self) -> list[str]:
        """What has changed, in words like ``parameter `0.weight```: parameters first."""
        now = _named(self._guarded.module)
        return sorted(
            (key for key in now.keys() | self._names.keys() if now.get(key) != self._names.get(key)),
            key=lambda key: (key.startswith("module"), key),
        )


def _named(module: nn.Module) -> dict[str, tuple[int, bool]]:
    found = {f"module `{name}`": (id(m), False) for name, m in module.named_modules()}
    return found | {f"parameter `{name}`": (id(p), p.requires_grad) for name, p in module.named_parameters()}


class SameGroups(Check):
    """The optimizer's groups hold all trained parameters and no others; how they are grouped does not matter.

    Catches: a parameter taken out of the groups or added to them. Costs: one look at every parameter in the groups. It
    comes after :class:`SameStructure`, which looks at ``requires_grad`` of the model's parameters.
    """

    def __init__(self, guarded: Guarded) -> None:
        self._trained = {name: id(p) for name, p in guarded.parameters.items()}
        self._wanted = set(self._trained.values())
        self._known = {id(p) for p in guarded.module.parameters()}
        self._confirmed: list[nn.Parameter] = []

    @override
    def before_step(self, optimizer: DPOptimizer) -> None:
        groups, confirmed = [group["params"] for group in optimizer.param_groups], self._confirmed
        if sum(map(len, groups)) == len(confirmed) and all(map(operator.is_, chain.from_iterable(groups), confirmed)):
            return
        held = list(chain.from_iterable(groups))
        self._refuse_other({id(p) for p in held if p.requires_grad})
        # Not with a parameter that is none of the model's: nobody looks whether it is trained.
        self._confirmed = held if all(id(p) in self._known for p in held) else []

    def _refuse_other(self, held: set[int]) -> None:
        if held == self._wanted:
            return
        missing = [name for name, p in self._trained.items() if p not in held]
        raise PlanBrokenError(
            f"optimizer: its param_groups changed after make_private_safe ({len(missing)} parameter(s) missing"
            + (f", first `{missing[0]}`" if missing else "")
            + ").",
            help="Set up all groups before the call.",
            path=missing[0] if missing else "optimizer",
        )


class FixedNorms(Check):
    """BatchNorm layers that were audited in ``eval()`` are still there.

    Catches: ``model.train()``, after which they mix the samples of a batch. Costs: a look at a flag per such layer.
    """

    def __init__(self, guarded: Guarded) -> None:
        self._guarded = guarded
        self._norms = [(path, guarded.module.get_submodule(path)) for path in guarded.plan.fixed_norms]
        self.needed = bool(self._norms)

    @override
    def before_step(self, optimizer: DPOptimizer) -> None:
        for path, norm in self._norms:
            if norm.training:
                raise PlanBrokenError(*switched_on(self._guarded.module, path), path=path)

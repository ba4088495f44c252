"""What stands in for an engine until the first real call of the model has shown which one is right."""

from __future__ import annotations

from typing import Any

from torch import nn
from typing_extensions import override

from dpfix.engines.base import Engine, IdleHandle, Verdict
from dpfix.plan import Plan


class Undecided(Engine):
    """The engine of a training that has not had its first real call: it lets nothing through but the noise of empty draws."""

    name = ""
    opacus_mode = "no_op"
    audited = False
    owns_gradients = False

    @override
    def supports(self, module: nn.Module, record: Any) -> Verdict:
        return Verdict("it computes nothing")

    @override
    def attach(self, module: nn.Module, plan: Plan, prepared: Any = None) -> UndecidedHandle:
        return UndecidedHandle(module)


class UndecidedHandle(IdleHandle):
    """Lets nothing through."""

    @override
    def collect(self, parameters: list[nn.Parameter]) -> list[int]:
        return []

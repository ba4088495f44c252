"""Parameters stay as they are between the forward pass and the step."""

from __future__ import annotations

import operator
from typing import Any

import torch
from opacus.optimizers import DPOptimizer
from torch import nn
from typing_extensions import override

from dpfix.errors import MisuseError
from dpfix.training.guards.check import Check, Guarded

_VERSION = operator.attrgetter("_version")


class ParameterWrites(Check):
    """Nothing writes to parameters between the model's forward pass and the step.

    Catches: updates by hand with ``p.grad``, and steps to a worst case (SAM), which follow gradients without noise. Costs:
    a sum over the parameters' version counters, in the forward pass and in the step.
    """

    def __init__(self, guarded: Guarded) -> None:
        self._name = guarded.name
        self._parameters = list(guarded.parameters.values())
        self._at_forward: int | None = None
        self._hook = guarded.module.register_forward_pre_hook(self._note)

    def _note(self, module: nn.Module, args: Any) -> None:
        if torch.is_grad_enabled():
            self._at_forward = self._versions()

    def _versions(self) -> int:
        with torch._C.DisableTorchFunction():  # no mode has to hear of it
            return sum(map(_VERSION, self._parameters))

    @override
    def before_step(self, optimizer: DPOptimizer) -> None:
        before, self._at_forward = self._at_forward, None
        if before is None or before == self._versions():
            return
        raise MisuseError(
            f"parameters of {self._name} were written to between the model's forward pass and optimizer.step().",
            "What is known about a batch there has no noise yet: an update by hand with p.grad, or a step to a worst case "
            "(SAM), would not be covered by the guarantee, and the gradients are those of other parameters.",
            "Write to parameters after optimizer.step() (weight decay by hand, averaging, clamping).",
            path="module",
        )

    @override
    def detach(self) -> None:
        self._hook.remove()

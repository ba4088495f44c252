"""Whether parameters were written to between the forward pass and the step."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from dpfix.errors import (
    MisuseError,
)

_VERSION = operator.attrgetter("_version")


class ParameterWrites:
    """Sees whether parameters were written to between the forward pass and the step."""

    def __init__(self, module: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._at_forward: int | None = None
        self._hook = module.register_forward_pre_hook(self._note)

    def _note(self, module: nn.Module, args: Any) -> None:
        if torch.is_grad_enabled():
            self._at_forward = self._versions()

    def _versions(self) -> int:
        return sum(map(_VERSION, self._parameters))

    def check(self, module: nn.Module) -> None:
        """Refuse the step if they were.

        Args:
            module: the model, for the message.

        Raises:
            MisuseError: they were.
        """
        before, self._at_forward = self._at_forward, None
        if before is None or before == self._versions():
            return
        raise MisuseError(
            f"parameters of {type(module).__name__} were written to between the model's forward pass and optimizer.step(). "
            "What is known about a batch there has no noise yet: an update by hand with p.grad, or a step to a worst case "
            "(SAM), would not be covered by the guarantee, and the gradients are those of other parameters. Write to "
            "parameters after optimizer.step() (weight decay by hand, averaging, clamping)."
        )

    def remove(self) -> None:
        """Take the hook off."""
        self._hook.remove()

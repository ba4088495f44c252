"""``model.zero_grad()`` of a model that is not wrapped clears what ``optimizer.zero_grad()`` clears."""

from __future__ import annotations

from typing import Any

from torch import nn

from dpfix.engines.replaced import Replaced


class ZeroGrad(Replaced):
    """Stands in for a model's ``zero_grad``, which ``transformers.Trainer`` calls instead of the optimizer's.

    Args:
        module: the plain model.
        optimizer: its private optimizer.
    """

    name = "zero_grad"

    def __init__(self, module: nn.Module, optimizer: Any) -> None:
        super().__init__(module)
        self._optimizer = optimizer

    def __call__(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the model, and what is kept per sample."""
        self.original(set_to_none)
        self._optimizer.zero_grad(set_to_none)

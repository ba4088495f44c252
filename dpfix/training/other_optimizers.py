"""No other optimizer may step over parameters that are in private training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import finalize, ref

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from dpfix.errors import (
    MisuseError,
)


class OtherSteps:
    """Refuses every step over the trained parameters that does not come through the private optimizer.

    Torch calls it before the step of any optimizer; it lives as long as the private training.

    Args:
        parameters: the trained parameters.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.allowed = False
        self._trained = [ref(p) for p in parameters]  # a WeakSet would compare tensors with ==
        reference = ref(self)

        def hook(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            this = reference()
            if this is not None:
                this.check(optimizer)

        self.remove = finalize(self, register_optimizer_step_pre_hook(hook).remove)

    def check(self, optimizer: Optimizer) -> None:
        """Refuse a step of another optimizer over trained parameters.

        Args:
            optimizer: the optimizer that is about to step.

        Raises:
            MisuseError: it holds a trained parameter, and the private optimizer is not stepping.
        """
        if self.allowed:
            return
        trained = {id(p()) for p in self._trained}
        if not any(id(p) in trained for group in optimizer.param_groups for p in group["params"]):
            return
        raise MisuseError(
            f"optimizer: {type(optimizer).__name__}.step() was called past the private optimizer that make_private_safe "
            "returned, over parameters that are in private training. It would apply gradients without clipping and noise. "
            "Use the returned optimizer, or call to_standard_module() on the model first to end private training."
        )

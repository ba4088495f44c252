"""A copy of a private optimizer.

Torch rebuilds a copied optimizer from its state and groups, and on the way wraps ``step`` of its class anew, after which no
optimizer of that class can step: Opacus's optimizers lack what the wrapper looks for. A copy is therefore an object of its
own class here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from opacus.optimizers import DPOptimizer
from torch.optim import Optimizer
from typing_extensions import override

from dpfix.errors import MisuseError

_SETTINGS = ("noise_multiplier", "max_grad_norm", "expected_batch_size", "loss_reduction")


class CopiedOptimizer(DPOptimizer):
    """State, groups and settings of a private optimizer. It belongs to no training and refuses to step.

    Args:
        original: a copy of the script's optimizer.
        settings: attributes by name.
    """

    def __init__(self, original: Optimizer, settings: dict[str, Any]) -> None:
        self.original_optimizer, self.step_hook, self.generator, self.secure_mode = original, None, None, False
        self._step_skip_queue: list[bool] = []
        self._is_last_step_skipped = False
        vars(self).update(settings)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return reduced(self)

    @override
    def step(self, closure: Callable[[], float] | None = None) -> NoReturn:
        raise MisuseError(
            "optimizer.step() was called on a copy of a private optimizer.",
            "A copy belongs to no private training: its step would be made without clipping, noise and accounting.",
            "Step the optimizer that make_private_safe returned; to go back to an earlier state use optimizer.state_dict() "
            "and load_state_dict().",
            path="optimizer",
        )


def reduced(optimizer: Any) -> Any:
    """How a private optimizer is copied and pickled."""
    return CopiedOptimizer, (optimizer.original_optimizer, {name: getattr(optimizer, name) for name in _SETTINGS})

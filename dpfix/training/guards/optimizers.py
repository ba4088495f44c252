"""How the loop calls optimizers: the private one alone, once per ``zero_grad``, without a scaler."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import finalize, ref

from opacus.optimizers import DPOptimizer
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from typing_extensions import override

from dpfix.errors import AccumulationError, MisuseError
from dpfix.training.follow.messages import learns_outside
from dpfix.training.follow.outside import Outside
from dpfix.training.guards.check import Check, Guarded


class ClearedGradients(Check):
    """``zero_grad`` is called between two steps.

    Catches: two batches released as one. Costs: a look at a flag.
    """

    def __init__(self) -> None:
        self._clear = True

    @override
    def cleared(self) -> None:
        self._clear = True

    @override
    def before_step(self, optimizer: DPOptimizer) -> None:
        if not self._clear:
            raise AccumulationError(
                "optimizer.step() without optimizer.zero_grad() since the last step: the gradients of two batches would be "
                "added up and released as one.",
                help="Call optimizer.zero_grad() before every backward().",
                path="optimizer",
            )

    @override
    def after_step(self, released: bool) -> None:
        self._clear = False


class NoGradScaler(Check):
    """No ``torch.amp.GradScaler`` makes the step.

    Catches: gradients scaled before they are clipped, and steps left out depending on the data. Costs: a look at an
    attribute, which a scaler sets.
    """

    @override
    def before_step(self, optimizer: DPOptimizer) -> None:
        if getattr(optimizer, "grad_scale", None) is not None:
            raise MisuseError(
                "optimizer.step() was called by a torch.amp.GradScaler.",
                "Its loss scale would multiply the gradients before they are clipped, and skipping steps on overflow depends "
                "on the data.",
                "Call loss.backward() and optimizer.step() without the scaler; bfloat16 autocast needs none.",
                path="optimizer",
            )


class NoOtherOptimizer(Check):
    """No other optimizer steps over parameters that are in private training, or that learn from its loss.

    Catches: gradients applied without clipping and noise, in the model or in a criterion with parameters of its own. Costs: nothing in a private step; every step of another
    optimizer in the process is compared with the trained parameters. Torch asks before the step of any optimizer, as
    long as the private training lives.

    Args:
        guarded: the training.
        outside: parameters outside the model that learn from the private loss.
    """

    def __init__(self, guarded: Guarded, outside: Outside) -> None:
        self._allowed = False
        self._outside = outside
        self._trained = [ref(p) for p in guarded.parameters.values()]  # a WeakSet would compare tensors with ==
        reference = ref(self)

        def hook(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            this = reference()
            if this is not None:
                this._refuse(optimizer)

        self._remove = finalize(self, register_optimizer_step_pre_hook(hook).remove)

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """The private optimizer is making its step.

        Yields:
            Nothing.
        """
        self._allowed = True
        try:
            yield
        finally:
            self._allowed = False

    def _refuse(self, optimizer: Optimizer) -> None:
        if self._allowed:
            return
        stepped = [p for group in optimizer.param_groups for p in group["params"]]
        learning = self._outside.among(stepped)
        if learning is not None:
            raise learns_outside(tuple(learning.shape), type(optimizer).__name__)
        trained = {id(p()) for p in self._trained}
        if not any(id(p) in trained for p in stepped):
            return
        raise MisuseError(
            f"optimizer: {type(optimizer).__name__}.step() was called past the private optimizer that make_private_safe "
            "returned, over parameters that are in private training.",
            "It would apply gradients without clipping and noise.",
            "Use the returned optimizer, or call to_standard_module() on the model first to end private training.",
            path="optimizer",
        )

    @override
    def detach(self) -> None:
        self._remove()

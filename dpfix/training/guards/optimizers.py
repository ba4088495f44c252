"""How the loop calls optimizers: the private one alone, once per ``zero_grad``, without a scaler."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any
from weakref import finalize, ref

import torch
from opacus.optimizers import DPOptimizer
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from typing_extensions import override

from dpfix.errors import AccumulationError, MisuseError
from dpfix.training.follow.hook import Hook
from dpfix.training.follow.messages import learns_outside
from dpfix.training.follow.outside import Outside
from dpfix.training.guards.check import Check, Guarded


class ClearedGradients(Check):
    """``zero_grad`` is called between two steps, or all ``p.grad`` are set to ``None`` before the model is called.

    A release leaves ``p.grad`` on every parameter. ``p.grad = None`` in a loop, and ``zero_grad`` of a compiled model or of
    another module around the model, are not seen otherwise.

    Catches: two batches released as one. Costs: a look at a flag.
    """

    def __init__(self, guarded: Guarded, optimizer: DPOptimizer) -> None:
        self._clear, self._guarded, self._optimizer = True, guarded, optimizer
        self._hook = guarded.module.register_forward_pre_hook(Hook(self._called), prepend=True)

    def _called(self, module: nn.Module, args: Any) -> None:
        """The model is called: what the script has cleared by hand, the optimizer clears too."""
        if self._clear or self._guarded.progress.partial or not torch.is_grad_enabled():
            return
        if all(p.grad is None for p in self._guarded.parameters.values()):
            self._optimizer.zero_grad()

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

    @override
    def take_over(self, earlier: ClearedGradients) -> None:
        self._clear = earlier._clear

    @override
    def detach(self) -> None:
        self._hook.remove()


class StepsInside(Check):
    """The optimizer inside steps with every release.

    Catches: accelerate's optimizer, prepared before the call, that leaves steps out while it accumulates gradients: a release
    would be accounted, and no parameter move. Costs: a look at two attributes.
    """

    @override
    def before_step(self, optimizer: DPOptimizer) -> None:
        accumulates = getattr(optimizer.original_optimizer, "gradient_state", None)
        if accumulates is not None and not accumulates.sync_gradients:
            raise AccumulationError(
                "optimizer.step() while accelerate accumulates gradients (gradient_accumulation_steps > 1): it would "
                "leave out this step, and the release would be accounted.",
                "Every draw is accounted as one step, and its gradients must not be added to those of another. No parameter has "
                "moved.",
                "Use gradient_accumulation_steps=1 and a larger batch size, with opacus.utils.batch_memory_manager if memory is "
                "short.",
                path="optimizer",
            )


class NoGradScaler(Check):
    """No ``torch.amp.GradScaler`` makes the step.

    Catches: gradients scaled before they are clipped, and steps left out depending on the data. Costs: a look at an
    attribute, which a scaler sets.
    """

    @override
    def before_step(self, optimizer: DPOptimizer) -> None:
        told, given = (
            ("grad_scale", "found_inf"),
            vars(optimizer),
        )  # the former is None where the script has called unscale_()
        if any(given.get(name) is not None for name in told):
            raise MisuseError(
                "optimizer.step() was called by a torch.amp.GradScaler.",
                "Its loss scale would multiply the gradients before they are clipped, and skipping steps on overflow depends "
                "on the data.",
                "Call loss.backward() and optimizer.step() without the scaler; bfloat16 autocast needs none.",
                path="optimizer",
            )


class NoOtherOptimizer(Check):
    """No other optimizer steps over parameters that are in private training, or that learn from its loss.

    Catches: gradients applied without clipping and noise, in the model or in a criterion with parameters of its own. Costs: a
    look at the first parameter in a private step; every step of another optimizer in the process looks its parameters up,
    however many trainings there are. Torch asks before the step of any optimizer.

    Args:
        guarded: the training.
        outside: parameters outside the model that learn from the private loss.

    Attributes:
        allowed: whether the private optimizer is making its step.
        outside: see above.
    """

    def __init__(self, guarded: Guarded, outside: Outside) -> None:
        self.allowed = False
        self.outside = outside
        self._trained = {id(p): ref(p) for p in guarded.parameters.values()}  # a WeakSet would compare tensors with ==
        this: ref[NoOtherOptimizer] = ref(self)
        _watch_too(this, self._trained)
        outside.at_learning = partial(_watch_too, this)
        self._forget = partial(_forget, this)
        finalize(self, self._forget).atexit = False
        _watch()

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """The private optimizer is making its step.

        Yields:
            Nothing.
        """
        try:
            self.allowed = True
            yield
            self.allowed = False
        except BaseException:
            self.allowed = False
            raise

    def owns(self, p: Any) -> bool:
        """Whether it is a parameter of this training: after it is gone, another may have its id."""
        return id(p) in self._trained and self._trained[id(p)]() is p

    @override
    def take_over(self, earlier: NoOtherOptimizer) -> None:
        self.allowed = earlier.allowed

    @override
    def detach(self) -> None:
        self._forget()


WATCHED: dict[int, tuple[ref[NoOtherOptimizer], ...]] = {}
"""The trainings that are alive, by the id of each of their parameters, and of those that learn from their loss.

Several can have one id: a parameter learns from two losses, or is gone, and another one has its id.
"""


def _watch_too(training: ref[NoOtherOptimizer], ids: Iterable[int]) -> None:
    for key in ids:
        watching = WATCHED.get(key, ())
        if training not in watching:
            WATCHED[key] = (*watching, training)


def _forget(training: ref[NoOtherOptimizer]) -> None:
    for key in [key for key, watching in WATCHED.items() if training in watching]:
        others = tuple(other for other in WATCHED[key] if other is not training)
        if others:
            WATCHED[key] = others
        else:
            del WATCHED[key]


@functools.cache
def _watch() -> None:
    """One look before the step of any optimizer, for all trainings together."""
    register_optimizer_step_pre_hook(_refuse_other)


def _refuse_other(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if not WATCHED:
        return
    for p in chain.from_iterable(group["params"] for group in optimizer.param_groups):
        for watching in WATCHED.get(id(p), ()):
            training = watching()
            if training is None:
                continue
            if training.outside.learns(p):
                raise learns_outside(tuple(p.shape), type(optimizer).__name__)
            if not training.owns(p):
                training.outside.tell(p, type(optimizer).__name__)
                continue
            if training.allowed:
                return
            raise MisuseError(
                f"optimizer: {type(optimizer).__name__}.step() was called past the private optimizer that make_private_safe "
                "returned, over parameters that are in private training.",
                "It would apply gradients without clipping and noise.",
                "Use the returned optimizer, or call to_standard_module() on the model first to end private training.",
                path="optimizer",
            )

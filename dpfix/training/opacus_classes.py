"""Opacus's classes in private training: every step of the optimizer passes the guard.

Each function here takes a class of Opacus's and gives the subclass that an object of it becomes in private training
(:func:`dpfix.training.handoff.hand_off`). Name and module are those of Opacus's class, and ``isinstance`` checks keep holding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from opacus.grad_sample import AbstractGradSampleModule
from opacus.optimizers import AdaClipDPOptimizer, DPOptimizer
from opacus.optimizers.optimizer import _check_processed_flag, _generate_noise, _mark_as_processed
from torch import nn
from typing_extensions import override

from dpfix.engines.base import drop_sample_gradients
from dpfix.instrument.precision import exact_products, without_autocast
from dpfix.instrument.turn import TURN
from dpfix.sampling.cryptographic import Cryptographic
from dpfix.sampling.randomness import OwnNoise, Randomness
from dpfix.training import in_training
from dpfix.training.adaptive_clipping import adaptive_class
from dpfix.training.cleared_by_model import ZeroGrad
from dpfix.training.clipping import clipping_class
from dpfix.training.copied_optimizer import reduced
from dpfix.training.cryptographic_noise import add_cryptographic_noise
from dpfix.training.guards.memory import mark
from dpfix.training.lineage import note
from dpfix.training.normal_noise import add_normal
from dpfix.training.out_of_memory import is_lack_of_memory, say_size
from dpfix.training.own_methods import own_method
from dpfix.training.sharded import add_noise_to_shards
from dpfix.training.step_guard import StepGuard
from dpfix.weights.copies import plain_copy


@functools.cache
def private_optimizer_class(cls: type[Any]) -> type[Any]:
    """The subclass of an optimizer of Opacus's in which every step passes the guard."""
    base = adaptive_class(cls) if issubclass(cls, AdaClipDPOptimizer) else clipping_class(cls)

    class PrivateOptimizer(base):
        guard: StepGuard
        randomness: Randomness
        _step_supports_amp_scaling = True  # a GradScaler then announces itself instead of scaling silently

        def zero_grad(self, set_to_none: bool = True) -> None:  # torch's default: zeros would only take memory
            super().zero_grad(set_to_none)
            self.guard.cleared()

        def __reduce_ex__(self, protocol: Any) -> Any:
            return reduced(self)

        def step(self, closure: Callable[[], float] | None = None) -> float | None:
            with TURN, self.guard.others.stepping():
                return super().step(closure)

        def __getattr__(self, name: str) -> Any:
            return own_method(self, name)

        @without_autocast
        def pre_step(self, closure: Callable[[], float] | None = None) -> bool:
            try:
                if not self.guard.before_step(self):
                    return False
                released = bool(super().pre_step(closure))
                if released:
                    self.guard.guarded.accounting.count(self)  # already done, unless its step hook has been taken off
                self.guard.after_step(released)
            except Exception as error:
                if is_lack_of_memory(error):
                    say_size(error, self.guard.guarded.ledger)
                self.guard.ranks.tell_others(self, error)
                raise
            return released

        def _check_skip_next_step(self, pop_next: bool = True) -> bool:
            signalled = super()._check_skip_next_step(pop_next)
            return signalled or self.guard.memory.due or not self.guard.draws.complete

        def state_dict(self) -> dict[str, Any]:
            return self.guard.guarded.accounting.written(super().state_dict())

        def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
            self.guard.guarded.accounting.load(state_dict, super().load_state_dict)

        def attach_step_hook(self, fn: Callable[[DPOptimizer], None]) -> None:
            super().attach_step_hook(self.guard.guarded.accounting.before(fn))

        def clip_and_accumulate(self) -> None:
            with self.guard.memory.giving_up():
                with exact_products():
                    self.guard.clip(self, super().clip_and_accumulate)
                self.guard.summed()

        def add_noise(self) -> None:
            self.guard.before_noise(self)
            noise = self.randomness.noise
            if self.guard.guarded.shards is not None:
                add_noise_to_shards(self)
            elif isinstance(noise, Cryptographic):
                add_cryptographic_noise(self, noise)
            elif plain and self.noise_multiplier > 0:
                add_noise_at_once(self, keep_sums=not self.guard.engine_clips)
            else:
                with OwnNoise(noise):
                    super().add_noise()

        def scale_grad(self) -> None:
            if not all_at_once:
                super().scale_grad()
            elif self.loss_reduction == "mean":
                torch._foreach_div_(
                    [p.grad for p in self.params], self.expected_batch_size * self.accumulated_iterations
                )

    plain = cls.add_noise is DPOptimizer.add_noise
    all_at_once = cls.scale_grad is DPOptimizer.scale_grad
    return _named_like(PrivateOptimizer, cls)


def add_noise_at_once(optimizer: DPOptimizer, *, keep_sums: bool) -> None:
    """What ``DPOptimizer.add_noise`` does, with the training's own random numbers: the same ones whichever engine has clipped.

    Args:
        optimizer: the private optimizer, whose parameters have ``summed_grad``.
        keep_sums: leave the sums as they are, as Opacus does, which looks whether they were used; otherwise the noise is added in
            their memory, and nobody can come across a sum without noise.
    """
    std = float(optimizer.noise_multiplier * optimizer.max_grad_norm)
    sums: list[Any] = [p.summed_grad for p in optimizer.params]  # type: ignore[attr-defined]
    for total in sums if keep_sums else ():
        _check_processed_flag(total)
    totals = [total.clone() for total in sums] if keep_sums else sums
    if optimizer.generator is None and not optimizer.secure_mode:
        add_normal(totals, std, optimizer.randomness.noise)  # type: ignore[attr-defined]
    else:
        for total in totals:
            total.add_(_generate_noise(std, total, optimizer.generator, optimizer.secure_mode))
    for p, total in zip(optimizer.params, totals, strict=True):
        p.grad = total if total.shape == p.shape else total.view_as(p)
        if keep_sums:
            _mark_as_processed(p.summed_grad)  # type: ignore[attr-defined]
        else:
            p.summed_grad = None  # type: ignore[attr-defined]


@functools.cache
def _transparent_wrapper_class(cls: type[Any]) -> type[Any]:
    """The subclass of a wrapper of Opacus's that answers for the model inside, and whose copies are not in training."""

    class Transparent(cls):
        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                if name == "_module":
                    raise
                return getattr(super().__getattr__("_module"), name)

        def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
            wrapped = all(key.startswith("_module.") for key in state_dict)
            target = super() if wrapped else self._module
            return target.load_state_dict(state_dict, *args, **kwargs)

        def __reduce_ex__(self, protocol: Any) -> Any:
            note(self._module.parameters())
            return _not_in_training, (plain_copy(self._module), self.loss_reduction, self.training)

        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            begun = memo.get(id(self._module))  # a model that holds its own wrapper is being copied
            if begun is not None:
                return begun
            made, given = self.__reduce_ex__(4)
            return made(*given)

    return _named_like(Transparent, cls)


@functools.cache
def private_wrapper_class(cls: type[Any]) -> type[Any]:
    """The subclass of a wrapper of Opacus's that ends the private training when it is taken off the model."""

    class PrivateWrapper(_transparent_wrapper_class(cls)):
        guard: StepGuard

        @torch.compiler.disable  # a compiled model goes on step by step: the compiler would trace the engine at every size
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output, failed = None, False
            try:
                output = super().forward(*args, **kwargs)
            except RuntimeError as error:
                if not is_lack_of_memory(error):
                    raise
                if not (self.training and torch.is_grad_enabled() and self.guard.memory.can_give_up()):
                    say_size(error, self.guard.guarded.ledger)
                    raise
                failed = True
            memory = self.guard.memory  # the call may have decided on another guard
            if failed:
                memory.give_up()
                output = memory.output(super().forward, args, kwargs)
            if memory.needed and torch.is_grad_enabled():
                mark(output, memory)
            return output

        def zero_grad(self, set_to_none: bool = False) -> None:
            super().zero_grad(set_to_none)
            self.guard.cleared()

        def cleanup(self) -> None:
            _end_training(self, super().cleanup)

    return _named_like(PrivateWrapper, cls)


@functools.cache
def private_hooks_class(cls: type[Any]) -> type[Any]:
    """The subclass of Opacus's hooks object, for models that are not wrapped, that ends the private training with it."""

    class PrivateHooks(cls):
        guard: StepGuard

        def cleanup(self) -> None:
            _end_training(self, super().cleanup)

    return _named_like(PrivateHooks, cls)


def _named_like(new: type[Any], cls: type[Any]) -> type[Any]:
    new.__name__, new.__qualname__, new.__module__ = cls.__name__, cls.__qualname__, cls.__module__
    return new


class PrivateModule(AbstractGradSampleModule):
    """Opacus's wrapper around a model whose per-sample gradients come from an engine of dpfix.

    A copy of a wrapper, or a pickled one, holds a copy of the model that is not in private training.
    """

    @override
    def remove_hooks(self) -> None:
        pass  # the engine is taken off by cleanup()


def _not_in_training(module: nn.Module, loss_reduction: str, training: bool) -> Any:
    return _transparent_wrapper_class(PrivateModule)(module, loss_reduction=loss_reduction).train(training)


def _end_training(holder: Any, opacus_cleanup: Callable[[], None]) -> None:
    """Leave the plain, repaired model behind, with nothing of ours or Opacus's on it."""
    guard: StepGuard = holder.guard
    module = holder._module
    vars(module).pop(ZeroGrad.name, None)
    if "real_calls" in holder.__dict__:
        holder.__dict__["real_calls"].take_out()
    guard.detach()
    note(module.parameters())
    opacus_cleanup()
    for name in guard.plan.frozen_parameters:
        module.get_parameter(name).requires_grad_(True)
    drop_sample_gradients(module.parameters())
    in_training.end(module)

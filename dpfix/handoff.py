"""Handing over to Opacus: the only caller of ``PrivacyEngine.make_private``.

Opacus prepares the optimizer, the accountant and (for its own engines) the hooks. What it hands back is then given
dpfix's guards by specialising the classes of these very objects: ``isinstance`` checks keep holding.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from opacus.distributed import DifferentiallyPrivateDistributedDataParallel
from opacus.grad_sample import AbstractGradSampleModule
from opacus.grad_sample.gsm_no_op import GradSampleHooksNoOp
from opacus.optimizers import DPOptimizer, get_optimizer_class
from opacus.optimizers.optimizer import _generate_noise
from torch import nn
from torch.utils.data import DataLoader

from dpfix.augmentation import AugmentationMultiplicity
from dpfix.engines import BY_NAME
from dpfix.engines.opacus_hooks import HooksHandle
from dpfix.errors import DPFixWarning
from dpfix.guards import StepGuard
from dpfix.plan import Plan
from dpfix.ranks import Ranks
from dpfix.sampling import DrawLedger, KnownRows, PrivateDataLoader, StandIn, batch_size, sample_rate
from dpfix.weights.copies import plain_copy

_ACTIVE: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
"""Models in private training, with the object whose ``cleanup`` ends it."""


class ParameterShell(nn.Module):
    """The parameters of a model without its layers.

    Opacus only needs the parameters when per-sample gradients come from an engine of dpfix; its validator would refuse
    layers (``nn.LSTM``, a BatchNorm in evaluation mode) for what its own hooks cannot do.

    Args:
        parameters: parameters by name.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        for name, p in parameters.items():
            self.register_parameter(name.replace(".", "/"), p)


@functools.cache
def _private_optimizer(cls: type[Any]) -> type[Any]:
    """One of Opacus's optimizer classes in which every step passes the guard."""

    class PrivateOptimizer(cls):
        guard: StepGuard
        flat = cls.clip_and_accumulate is DPOptimizer.clip_and_accumulate
        _step_supports_amp_scaling = True  # a GradScaler then announces itself instead of scaling silently

        def zero_grad(self, set_to_none: bool = True) -> None:  # torch's default: zeros would only take memory
            super().zero_grad(set_to_none)
            self.guard.cleared()

        def step(self, closure: Callable[[], float] | None = None) -> float | None:
            with self.guard.stepping():
                return super().step(closure)

        def pre_step(self, closure: Callable[[], float] | None = None) -> bool:
            with self.guard.telling_other_ranks(self):
                if self.guard.gives_up(self):
                    return False
                self.guard.before_step(self)
                released = bool(super().pre_step(closure))
                self.guard.after_step(released)
                return released

        def attach_step_hook(self, fn: Callable[[DPOptimizer], None]) -> None:
            super().attach_step_hook(self.guard.with_accountant(fn))

        def clip_and_accumulate(self) -> None:
            if not self.guard.clip(self):
                super().clip_and_accumulate()
            self.guard.check_finite()

        def add_noise(self) -> None:
            self.guard.agree(self)
            if in_place and self.guard.clipped and self.noise_multiplier > 0:
                add_noise_in_place(self)
            else:
                super().add_noise()

    in_place = cls.add_noise is DPOptimizer.add_noise
    return _named_like(PrivateOptimizer, cls)


def add_noise_in_place(optimizer: DPOptimizer) -> None:
    """What ``DPOptimizer.add_noise`` does, with the same random numbers, in the memory of the clipped sum.

    The sum without noise is gone afterwards; nobody can come across it.

    Args:
        optimizer: the private optimizer, whose parameters have ``summed_grad``.
    """
    std = optimizer.noise_multiplier * optimizer.max_grad_norm
    for p in optimizer.params:
        total: torch.Tensor = p.summed_grad  # type: ignore[attr-defined]
        if optimizer.secure_mode:
            total += _generate_noise(std, total, optimizer.generator, True)
        else:
            total += torch.normal(
                0.0, std, total.shape, device=total.device, generator=optimizer.generator, dtype=total.dtype
            )
        p.grad, p.summed_grad = total.view_as(p), None  # type: ignore[attr-defined]


@functools.cache
def _transparent(cls: type[Any]) -> type[Any]:
    """One of Opacus's wrappers that answers for the model inside, and whose copies are not in training."""

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
            return _not_in_training, (plain_copy(self._module), self.loss_reduction, self.training)

    return _named_like(Transparent, cls)


@functools.cache
def _private_wrapper(cls: type[Any]) -> type[Any]:
    """One of Opacus's wrappers, in private training."""

    class PrivateWrapper(_transparent(cls)):
        guard: StepGuard

        def zero_grad(self, set_to_none: bool = False) -> None:
            super().zero_grad(set_to_none)
            self.guard.cleared()

        def cleanup(self) -> None:
            _end(self, super().cleanup)

    return _named_like(PrivateWrapper, cls)


@functools.cache
def _private_hooks(cls: type[Any]) -> type[Any]:
    """One of Opacus's hooks objects, for models that are not wrapped."""

    class PrivateHooks(cls):
        guard: StepGuard

        def cleanup(self) -> None:
            _end(self, super().cleanup)

    return _named_like(PrivateHooks, cls)


def _named_like(new: type[Any], cls: type[Any]) -> type[Any]:
    new.__name__, new.__qualname__, new.__module__ = cls.__name__, cls.__qualname__, cls.__module__
    return new


class PrivateModule(AbstractGradSampleModule):
    """Opacus's wrapper around a model whose per-sample gradients come from an engine of dpfix.

    A copy of a wrapper, or a pickled one, holds a copy of the model that is not in private training.
    """

    def remove_hooks(self) -> None:
        """Nothing to do: the engine is taken off by :meth:`cleanup`."""


def _not_in_training(module: nn.Module, loss_reduction: str, training: bool) -> Any:
    return _transparent(PrivateModule)(module, loss_reduction=loss_reduction).train(training)


def _end(holder: Any, opacus_cleanup: Callable[[], None]) -> None:
    guard: StepGuard = holder.guard
    module = holder._module
    guard.detach()
    opacus_cleanup()
    for name in guard.plan.frozen_parameters:
        module.get_parameter(name).requires_grad_(True)
    for p in module.parameters():
        for attribute in ("summed_grad", "grad_sample"):
            if hasattr(p, attribute):
                delattr(p, attribute)
    _ACTIVE.pop(module, None)


def _specialise(thing: Any, cls: type[Any], guard: StepGuard) -> None:
    thing.__class__ = cls
    thing.__dict__["guard"] = guard


def end_earlier(module: nn.Module) -> nn.Module:
    """End a private training that this model is already in.

    Args:
        module: a model, or the wrapper of an earlier call.

    Returns:
        The plain model.
    """
    while isinstance(module, AbstractGradSampleModule):
        module = module.to_standard_module()
    earlier = _ACTIVE.get(module)
    if earlier is not None:
        earlier.cleanup()
    return module


def option_names(clipping: str, mode: str) -> frozenset[str]:
    """Names of the further options that Opacus's optimizer and noise search take.

    Args:
        clipping: the clipping scheme.
        mode: ``grad_sample_mode``.

    Returns:
        Keyword names.
    """
    cls = get_optimizer_class(clipping=clipping, distributed=False, grad_sample_mode=mode)
    names = set(inspect.signature(cls.__init__).parameters)
    return frozenset(names) - {
        "self",
        "args",
        "kwargs",
        "optimizer",
        "generator",
        "secure_mode",
        "expected_batch_size",
    }


def hand_off(
    make_private: Callable[..., Any],
    privacy_engine: Any,
    *,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    data_loader: DataLoader[Any],
    plan: Plan,
    stand_in: StandIn,
    known_rows: KnownRows | None,
    augmentation: AugmentationMultiplicity | None,
    poisson_sampling: bool,
    wrap_model: bool,
    ranks: Ranks,
    **settings: Any,
) -> tuple[Any, ...]:
    """Make the objects private with Opacus and put the guards on.

    Args:
        make_private: Opacus's method of the privacy engine.
        privacy_engine: the privacy engine itself, for its accountant.
        module: the repaired model.
        optimizer: the user's optimizer.
        data_loader: the user's loader.
        plan: what was decided.
        stand_in: what an empty draw delivers.
        known_rows: what the loader has to see in every sample, if it has several rows.
        augmentation: makes several views of every sample.
        poisson_sampling: whether to sample.
        wrap_model: whether to wrap the model.
        ranks: the processes that train together.
        **settings: privacy settings and options, handed on as they are.

    Returns:
        ``(model, optimizer, data_loader)``.
    """
    ledger = DrawLedger() if poisson_sampling else None
    loader: DataLoader[Any] = data_loader
    if ledger is not None:
        loader = PrivateDataLoader(
            data_loader,
            stand_in=stand_in,
            ledger=ledger,
            generator=privacy_engine.secure_rng,
            augmentation=augmentation,
            row_counter=plan.row_counter,
            known_rows=known_rows,
            ranks=ranks,
        )
    _check_dataset(privacy_engine, data_loader)
    everything = dict(module.named_parameters())
    parameters = {n: p for n, p in everything.items() if p.requires_grad}
    own = plan.opacus_mode == "no_op"
    shell: nn.Module = ParameterShell(everything)
    if ranks.size > 1:
        shell = DifferentiallyPrivateDistributedDataParallel(shell)  # which optimizer Opacus takes depends on it
    prepared, private_optimizer, *_ = make_private(
        module=shell if own else module,
        optimizer=optimizer,
        data_loader=loader,
        poisson_sampling=False,  # the loader above already draws; Opacus's takes its rate from len(loader)
        grad_sample_mode=plan.opacus_mode,
        wrap_model=wrap_model,
        loss_reduction=plan.loss_reduction,
        batch_first=plan.batch_first or own,
        **settings,
    )
    if own:
        wrapper = PrivateModule if wrap_model else GradSampleHooksNoOp
        prepared = wrapper(module, loss_reduction=plan.loss_reduction)
    handle = BY_NAME[plan.engine].attach(module, plan, prepared)
    if isinstance(handle, HooksHandle):
        handle.several_iterations = ledger is None
    guard = StepGuard(handle, module, plan, parameters, ledger, ranks)
    make_class = _private_wrapper if wrap_model else _private_hooks
    _specialise(prepared, make_class(type(prepared)), guard)
    _specialise(private_optimizer, _private_optimizer(type(private_optimizer)), guard)
    _account(privacy_engine, private_optimizer, data_loader, ranks)
    guard.remember_call(private_optimizer)
    guard.count_steps(private_optimizer)
    guard.accounted = lambda: sum(entry[-1] for entry in privacy_engine.accountant.history)
    if ledger is not None:
        ledger.at_start = lambda: guard.begin_pass(private_optimizer)
    _ACTIVE[module] = prepared
    return prepared, private_optimizer, loader


def _check_dataset(privacy_engine: Any, loader: DataLoader[Any]) -> None:
    """One accountant speaks about one dataset; Opacus prints both datasets, dpfix says what it means."""
    known = privacy_engine.dataset
    if known is not None and known is not loader.dataset:
        warnings.warn(
            f"privacy_engine already accounts for another dataset ({type(known).__name__}, {len(known)} samples); data_loader "
            f"reads {type(loader.dataset).__name__}. Its epsilon adds up the steps on both, which is right only if they are "
            "the same people. Use a new PrivacyEngine for other data.",
            DPFixWarning,
            stacklevel=4,
        )
    privacy_engine.dataset = loader.dataset


def _account(privacy_engine: Any, optimizer: DPOptimizer, loader: DataLoader[Any], ranks: Ranks) -> None:
    """Rate and expected batch size of the sampler's own index set, instead of Opacus's ``1 / len(loader)``.

    Opacus's distributed optimizer divides by the number of ranks itself.
    """
    expected = batch_size(loader) / ranks.size
    optimizer.expected_batch_size = int(expected) if float(expected).is_integer() else expected  # type: ignore[assignment]
    hook = privacy_engine.accountant.get_optimizer_hook_fn(sample_rate=sample_rate(loader))
    optimizer.attach_step_hook(hook)
    if optimizer.noise_multiplier == 0:
        privacy_engine.get_epsilon = _no_privacy


def _no_privacy(delta: float) -> float:
    """Without noise there is no privacy: epsilon is infinite (the accountants overflow instead)."""
    return float("inf")

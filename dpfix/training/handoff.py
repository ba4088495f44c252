"""Handing over to Opacus: the only caller of ``PrivacyEngine.make_private``.

Opacus prepares the optimizer, the accountant and (for its own engines) the hooks. What it hands back is then given
dpfix's guards by specialising the classes of these very objects: ``isinstance`` checks keep holding.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from opacus import PrivacyEngine
from opacus.distributed import DifferentiallyPrivateDistributedDataParallel
from opacus.grad_sample.gsm_no_op import GradSampleHooksNoOp
from opacus.optimizers import DPOptimizer, get_optimizer_class
from torch import nn
from torch.utils.data import DataLoader

from dpfix.engines import engine_of
from dpfix.instrument.source import warn_user
from dpfix.plan import Plan
from dpfix.sampling.augmentation import AugmentationMultiplicity
from dpfix.sampling.collate import CollateOrPlaceholder, KnownRows, Placeholder, user_collate
from dpfix.sampling.ledger import DrawLedger
from dpfix.sampling.loader import PrivateDataLoader, split_by_draws
from dpfix.sampling.own_loader import Deliveries
from dpfix.sampling.people import items_behind
from dpfix.sampling.poisson import Drawing
from dpfix.sampling.population import Population
from dpfix.sampling.randomness import Randomness
from dpfix.sampling.ranks import Ranks
from dpfix.sampling.rate import accounted_rate, batch_size
from dpfix.training import in_training
from dpfix.training.accounting import Accounting, answer_of
from dpfix.training.cleared_by_model import ZeroGrad
from dpfix.training.clipping import settle
from dpfix.training.first_step import Decide, RealCalls, put_to_work
from dpfix.training.guards.check import Guarded
from dpfix.training.guards.following import Following
from dpfix.training.loader_owner import replace_loader
from dpfix.training.opacus_classes import (
    PrivateModule,
    private_hooks_class,
    private_optimizer_class,
    private_wrapper_class,
)
from dpfix.training.spender import Spender
from dpfix.training.step_guard import StepGuard


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


@dataclass(frozen=True)
class Originals:
    """The user's objects, which Opacus gets.

    Attributes:
        module: the repaired model.
        optimizer: the user's optimizer.
        data_loader: the user's loader, or one of persons in its place.
        given_loader: the loader that the script has.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer
    data_loader: DataLoader[Any]
    given_loader: DataLoader[Any]


@dataclass(frozen=True)
class Decided:
    """What was found out and decided before the hand-off.

    Attributes:
        randomness: where noise and draws come from.
        plan: how the model is to be trained.
        placeholder: what an empty draw delivers.
        known_rows: what the loader has to see in every sample, if it has several rows.
        augmentation: makes several views of every sample.
        sampling: how batches are drawn; see :data:`dpfix.scan.options.SAMPLINGS`.
        ranks: the processes that train together.
        following: what is known about the real steps.
        spender: writes into the file of a budget; ``None`` without one.
        decide: decides on real calls of a form that was not audited; ``None`` where the loop's calls were told.
        told: whether they were told, and only what comes back to be trained is decided on.
    """

    randomness: Randomness
    plan: Plan
    placeholder: Placeholder
    known_rows: KnownRows | None
    augmentation: AugmentationMultiplicity | None
    sampling: str
    ranks: Ranks
    following: Following
    spender: Spender | None
    decide: Decide | None = None
    told: bool = False


def hand_off(
    make_private: Callable[..., Any],
    privacy_engine: Any,
    originals: Originals,
    decided: Decided,
    *,
    wrap_model: bool,
    for_opacus: Mapping[str, Any],
) -> tuple[Any, ...]:
    """Make the objects private with Opacus and put the guards on.

    Args:
        make_private: Opacus's method of the privacy engine.
        privacy_engine: the privacy engine itself, for its accountant.
        originals: the user's objects.
        decided: what was decided about them.
        wrap_model: whether to wrap the model.
        for_opacus: noise, clip norm, clipping and further options, handed on as they are.

    Returns:
        ``(model, optimizer, data_loader)``.
    """
    module, plan, ranks = originals.module, decided.plan, decided.ranks
    ledger = DrawLedger() if decided.sampling != "fixed" else None
    loader = originals.data_loader if ledger is None else _private_loader(originals, decided, ledger, privacy_engine)
    own_loader = Deliveries(loader, decided.following.collation) if ledger is None else None
    _check_dataset(privacy_engine, originals.data_loader)
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    engine = engine_of(plan)
    own = not engine.attached_by_opacus
    prepared, private_optimizer, *_ = make_private(
        module=_shell(module, ranks) if own else module,
        optimizer=originals.optimizer,
        data_loader=loader,
        poisson_sampling=False,  # the loader above already draws; Opacus's takes its rate from len(loader)
        grad_sample_mode=plan.opacus_mode,
        wrap_model=wrap_model,
        loss_reduction=plan.loss_reduction,
        batch_first=plan.batch_first or own,
        **for_opacus,
    )
    settle(private_optimizer, plan.clipping)
    if own:
        wrapper = PrivateModule if wrap_model else GradSampleHooksNoOp
        prepared = wrapper(module, loss_reduction=plan.loss_reduction)
    handle = put_to_work(module, plan, prepared, ledger)
    accounting = _account(privacy_engine, private_optimizer, originals.data_loader, decided, ledger)
    accounting.own_loader = own_loader
    if decided.spender is not None and ranks.rank == 0:  # all ranks together make one release
        accounting.spend_from(decided.spender)
    guarded = Guarded(module, plan, trained, handle, accounting, ledger, ranks, own_loader, handle.shards)
    guard = StepGuard(guarded, private_optimizer, decided.following)
    make_class = private_wrapper_class if wrap_model else private_hooks_class
    _specialise(prepared, make_class(type(prepared)), guard)
    _specialise(private_optimizer, private_optimizer_class(type(private_optimizer)), guard)
    private_optimizer.__dict__["randomness"] = decided.randomness
    if ledger is not None:
        ledger.at_start = lambda begun: private_optimizer.guard.draws.begin_pass(private_optimizer, begun)
        ledger.at_end = accounting.at_end_of_pass
    split_by_draws()
    in_training.begin(module, prepared)
    if not wrap_model:
        ZeroGrad(module, private_optimizer).put_in()
    if own and decided.decide is not None:
        calls = RealCalls(module, prepared, private_optimizer, decided.decide, told=decided.told)
        vars(prepared)["real_calls"] = vars(private_optimizer)["real_calls"] = calls
        calls.put_in()
    replace_loader(module, originals.given_loader, loader)
    return prepared, private_optimizer, loader


def _specialise(thing: Any, cls: type[Any], guard: StepGuard) -> None:
    """The very object becomes one of a subclass: whoever holds it has the guarded one."""
    thing.__class__ = cls
    thing.__dict__["guard"] = guard


def _private_loader(
    originals: Originals, decided: Decided, ledger: DrawLedger, privacy_engine: Any
) -> PrivateDataLoader:
    loader = originals.data_loader
    collate = CollateOrPlaceholder(
        user_collate(loader),
        decided.placeholder,
        decided.augmentation,
        decided.known_rows,
        row_counter=decided.plan.row_counter,
        ledger=ledger,
        look=decided.following.collation,
    )
    ledger.position.reproducible = decided.randomness.seed is not None
    drawing = Drawing(ledger, decided.randomness.draws, decided.ranks, decided.sampling)
    private = PrivateDataLoader(loader, collate, drawing, privacy_engine.secure_rng)
    private.most = decided.plan.physical
    return private


def _shell(module: nn.Module, ranks: Ranks) -> nn.Module:
    shell = ParameterShell(dict(module.named_parameters()))
    if ranks.size > 1 and not ranks.sharded:  # which optimizer Opacus takes depends on it
        return DifferentiallyPrivateDistributedDataParallel(shell)
    return shell


def _check_dataset(privacy_engine: Any, loader: DataLoader[Any]) -> None:
    """One accountant speaks about one dataset; Opacus prints both datasets, dpfix says what it means."""
    known = privacy_engine.dataset
    if known is not None and items_behind(known) is not items_behind(loader.dataset):
        warn_user(
            f"privacy_engine already accounts for another dataset ({type(known).__name__}, {len(known)} samples); data_loader "
            f"reads {type(loader.dataset).__name__}. Its epsilon adds up the steps on both, which is right only if they are "
            "the same people. Use a new PrivacyEngine for other data."
        )
    privacy_engine.dataset = loader.dataset


def _account(
    privacy_engine: Any, optimizer: DPOptimizer, loader: DataLoader[Any], decided: Decided, ledger: DrawLedger | None
) -> Accounting:
    """Rate and expected batch size of the sampler's own index set, instead of Opacus's ``1 / len(loader)``."""
    # Opacus's distributed optimizer divides by the number of ranks itself.
    expected = batch_size(loader) / (1 if decided.ranks.sharded else decided.ranks.size)
    optimizer.expected_batch_size = int(expected) if float(expected).is_integer() else expected  # type: ignore[assignment]
    if type(privacy_engine).get_epsilon is PrivacyEngine.get_epsilon:
        privacy_engine.get_epsilon = MethodType(answer_of, privacy_engine)
    rate = accounted_rate(loader, decided.sampling)
    return Accounting(optimizer, privacy_engine, Population(loader), rate, ledger, decided.sampling)

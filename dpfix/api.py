"""The entry points: check the arguments, prepare (:mod:`dpfix.pipeline`), hand off to Opacus."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from opacus import PrivacyEngine
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from dpfix.errors import DPFixError
from dpfix.instrument.defaults import no_meta_default
from dpfix.instrument.rng import rng_untouched
from dpfix.observe.training_step import StepFunction
from dpfix.pipeline import Prepared, deciding, prepare, refuse, warn_blocked
from dpfix.repair.surgery import Surgery
from dpfix.report.finding import Finding
from dpfix.report.report import Report
from dpfix.report.versions import versions
from dpfix.rules import RULES
from dpfix.rules.rule import run_rules
from dpfix.sampling.augmentation import AugmentationMultiplicity
from dpfix.sampling.randomness import Randomness
from dpfix.sampling.rate import accounted_compositions
from dpfix.scan.arguments import (
    check_augmentation,
    check_budget,
    check_delta,
    check_functions,
    check_names,
    check_objects,
    check_randomness,
    check_values,
    check_wrapping,
)
from dpfix.scan.clipping import by_parameter, for_opacus, opacus_clipping
from dpfix.scan.options import PerformanceOptions, PrivacyOptions
from dpfix.scan.privacy_unit import by_person
from dpfix.scan.request import Request
from dpfix.scan.values import plain, plain_options, plain_performance, plain_privacy, truth
from dpfix.training.all_or_nothing import all_or_nothing
from dpfix.training.budget import Budget
from dpfix.training.earlier import earlier_releases
from dpfix.training.epsilon import ACCURACY, Accuracy
from dpfix.training.follow.agenda import SHARE
from dpfix.training.guards.following import Following
from dpfix.training.handoff import Decided, Originals, hand_off, option_names
from dpfix.training.noise_search import EPSILON_TOLERANCE, Target, noise_for, tolerance_of
from dpfix.training.own_objects import as_trained, out_of_earlier
from dpfix.training.privacy_engine import CheckpointingEngine, check_given_engine, opacus_make_private, secure_source
from dpfix.training.releases import refuse_mixture
from dpfix.training.result import PrivateTraining, planned
from dpfix.training.sharded import as_whole, repair_spread
from dpfix.training.spender import spender_for


@all_or_nothing
def make_private_safe(
    *,
    module: nn.Module,
    optimizer: Optimizer,
    data_loader: DataLoader[Any],
    noise_multiplier: float,
    max_grad_norm: float | list[float] | dict[str, float],
    criterion: Callable[..., Any] | None = None,
    training_step: StepFunction | None = None,
    privacy_engine: PrivacyEngine | None = None,
    batch_first: bool = True,
    loss_reduction: str = "mean",
    poisson_sampling: bool = True,
    sampling: str | None = None,
    accountant: str | None = None,
    clipping: str = "flat",
    stability_constant: float | None = None,
    noise_generator: torch.Generator | None = None,
    seed: int | None = None,
    secure_mode: bool = False,
    grad_sample_mode: str = "auto",
    augmentation: AugmentationMultiplicity | None = None,
    privacy_unit: Any = None,
    items_per_unit: int | None = None,
    wrap_model: bool = True,
    rand_on_empty: bool = False,
    norm: str = "group",
    no_grad_regions: bool = True,
    cache: bool = True,
    max_physical_batch_size: int | str | None = None,
    checks: float = SHARE,
    strict: bool = False,
    budget: Budget | None = None,
    **options: Any,
) -> PrivateTraining:
    """Make a model, its optimizer and its loader private; the training loop stays as it is.

    The model is repaired in place where DP-SGD cannot work with it, the clipped sum that will be released is compared
    with a batch-of-one reference, the fastest engine that passes is chosen, and Opacus's ``PrivacyEngine`` takes over.
    If anything is refused, model, optimizer, loader and generators are exactly as before the call.

    Args:
        module: the model, in training mode.
        optimizer: an optimizer over its trainable parameters; the same object steps inside the returned one.
        data_loader: a map-style loader; its sampler is replaced by Poisson sampling over the same index set.
        noise_multiplier: standard deviation of the noise as a multiple of the clip norm; 0 for tests.
        max_grad_norm: clip norm C of a sample's gradient; a list with ``"per_layer"``, by pattern of names with ``"per_group"``.
        criterion: the loop's loss function, if ``training_step`` is not given.
        training_step: ``(model, batch) -> loss`` exactly as the loop computes it; if not given, inferred from a batch or, where
            that does not tell it, from the first real step.
        privacy_engine: an Opacus engine whose accountant is to be used; a new one if not given.
        batch_first: whether the samples are in dimension 0 (for Opacus's engines).
        loss_reduction: ``"mean"`` or ``"sum"`` over the samples.
        poisson_sampling: ``False`` is ``sampling="fixed"``.
        sampling: ``"poisson"`` if not given; ``"truncated"``: with a largest batch; ``"shuffle"``: the loader's own order, every
            sample once a pass, accounted as one release; ``"fixed"``: the loader left alone, every step accounted in full.
        accountant: ``"prv"`` if not given, ``"rdp"``, ``"gdp"`` or, with ``dpfix[accounting]``, ``"pld"``; of a new engine.
        clipping: ``"flat"``, ``"per_layer"``, ``"per_group"``, ``"automatic"`` or ``"adaptive"``.
        stability_constant: of automatic clipping; 0.01 if not given.
        noise_generator: source of the noise, for experiments that are to be repeated; see ``seed``.
        seed: makes noise and draws reproducible. Without it they come from generators of the training's own, which the
            operating system seeds. Noise that can be computed again protects nobody from whoever knows the seed.
        secure_mode: draw noise and batches with the operating system's cryptographic generator, and keep the noise from
            showing in the last bits of what is released; slower. As in ``SafePrivacyEngine(secure_mode=True)``.
        grad_sample_mode: ``"auto"``, an engine's name, or ``"no_op"`` for a loop that fills ``grad_sample`` itself.
        augmentation: several views of every sample, averaged before clipping; the returned loader delivers them as rows
            next to each other. If not given, that of the earlier call from which ``data_loader`` comes.
        privacy_unit: who an item belongs to: a key or column (``"patient_id"``), a function of an item, or a list with a name for
            every index. Persons are drawn, and what is clipped is the mean over a person's items.
        items_per_unit: items of a person in a batch at most, drawn at random; all if not given.
        wrap_model: return Opacus's wrapper; ``False`` works on the model itself and keeps its state-dict keys.
        rand_on_empty: accepted for compatibility; an empty draw never reaches the model.
        norm: what replaces BatchNorm: ``"group"``, ``"instance"``, ``"layer"``, or ``"folded"`` for a pretrained model.
        no_grad_regions: run module calls that no gradient comes back to (``detach``) without a graph.
        cache: remember in the user's cache directory which engine was fastest for this model; it is audited all the same.
        max_physical_batch_size: samples in memory at a time, or ``"auto"``; batches come in parts, the loop is the same.
        checks: share of the training time that checks of random real steps may take. The first steps, and steps on which
            anything new is seen, are checked in any case; nothing is released in a step that fails.
        strict: refuse a loop whose loss cannot be followed, instead of warning once.
        budget: that of the data, shared by all trainings on it; a step that would go beyond it is refused.
        **options: further options of Opacus's optimizers (adaptive clipping).

    Returns:
        A tuple ``(model, optimizer, data_loader)`` with ``report``, ``plan`` and the privacy accounting.

    Raises:
        ArgumentError: an argument cannot be used.
        DPFixError: something keeps the guarantee from holding; the subclass and the message say what and where.
        RankError: another of the processes that make this call together cannot, or makes another call.
    """
    request = out_of_earlier(Request(module, optimizer, data_loader, criterion, training_step, *options_of(locals())))
    engine, carried = _engine(privacy_engine, secure_mode, accountant), list[Finding]()

    def report_of(prepared: Prepared) -> Report:
        report = prepared.report(request, noise_multiplier, secure=engine.secure_mode)
        return replace(report, findings=(*report.findings, *carried))

    with request.ranks.all_or_none():
        request, options = _checked(request, noise_multiplier, options, engine)
        noise_multiplier, wrap_model = float(plain(noise_multiplier)), truth("wrap_model", wrap_model)
        truth("rand_on_empty", rand_on_empty)
        check_randomness(request.privacy, engine.secure_mode)
        check_wrapping(request.performance, wrap_model)
        with no_meta_default(), Surgery((whole := as_whole(request, engine.secure_mode)).scan) as surgery:
            prepared = prepare(whole, surgery)
            repair_spread(request, prepared.findings)
            request.ranks.check_same(prepared.what_is_trained(whole, noise_multiplier))
            earlier = earlier_releases(request.module, request.optimizer, request.data_loader)
            refuse_mixture(engine.accountant, [*earlier.history(engine), (noise_multiplier, request.rate, 1)])
            spender = spender_for(budget, request, engine, earlier.releases)
            if spender is not None:
                spender.check((noise_multiplier, request.rate), 1, "a step of this training")
            made = hand_off(
                opacus_make_private(engine),
                engine,
                Originals(request.module, request.optimizer, request.data_loader, data_loader),
                Decided(
                    Randomness.of(request.privacy.seed, secure_source(engine), request.ranks),
                    prepared.plan,
                    prepared.placeholder,
                    prepared.known_rows,
                    request.privacy.augmentation,
                    request.privacy.sampling,
                    request.ranks,
                    Following(prepared.step, prepared.batches, request.privacy.checks, request.privacy.strict),
                    spender,
                    deciding(request, prepared, report_of),
                    training_step is not None,
                ),
                wrap_model=wrap_model,
                for_opacus={
                    "noise_multiplier": noise_multiplier,
                    **for_opacus(request, prepared.plan.frozen_parameters),
                    "noise_generator": noise_generator,
                    **options,
                },
            )
            made[1].guard.guarded.accounting.agree(request.ranks)
            surgery.commit()
    carried += earlier.carry_on(engine, made[1], given=privacy_engine is not None)
    report = report_of(prepared)
    warn_blocked(report)
    return PrivateTraining(made, report, engine)


_ARGUMENTS = inspect.signature(make_private_safe).parameters
"""The arguments of the call; nowhere else are their defaults written."""


@all_or_nothing
def make_private_safe_with_epsilon(
    *,
    module: nn.Module,
    optimizer: Optimizer,
    data_loader: DataLoader[Any],
    target_epsilon: float,
    target_delta: float,
    epochs: int,
    max_grad_norm: float | list[float] | dict[str, float],
    privacy_engine: PrivacyEngine | None = None,
    **arguments: Any,
) -> PrivateTraining:
    """As :func:`make_private_safe`, with the noise that reaches a privacy budget after some epochs.

    Args:
        target_epsilon: the budget after ``epochs`` epochs.
        target_delta: its delta; smaller than 1 / number of samples (of persons with ``privacy_unit``).
        epochs: number of passes over the returned loader.
        max_grad_norm: see :func:`make_private_safe`.
        privacy_engine: see :func:`make_private_safe`.
        **arguments: all other arguments of :func:`make_private_safe` (what a ``budget`` holds counts towards
            ``target_epsilon``), and options of the noise search: ``epsilon_tolerance``, and ``alphas``, ``eps_error`` and
            ``delta_error`` of :meth:`PrivateTraining.get_epsilon`.

    Returns:
        See :func:`make_private_safe`.

    Raises:
        ArgumentError: the budget cannot be reached, or an argument is out of range.
    """
    search = {k: arguments.pop(k) for k in tuple(arguments) if k in _SEARCH}
    loss = arguments.get("criterion"), arguments.get("training_step")
    options = options_of({"max_grad_norm": max_grad_norm, **arguments})
    request = out_of_earlier(Request(module, optimizer, data_loader, *loss, *options))
    engine = _engine(privacy_engine, arguments.get("secure_mode", False), arguments.get("accountant"))
    with request.ranks.all_or_none():
        delta, (epsilon, passes) = check_delta(target_delta), check_budget(target_epsilon, epochs)
        further = {name: value for name, value in arguments.items() if name not in _ARGUMENTS}
        request, _ = _checked(request, 0.0, further, engine)
        check_randomness(request.privacy, engine.secure_mode)
        tolerance = tolerance_of(search.pop("epsilon_tolerance", EPSILON_TOLERANCE))
        accuracy = Accuracy.of(delta, **search)
        if not request.ranks.sharded:  # what can be refused at once is, before the search for the noise
            refuse(run_rules(request.scan, RULES))
        earlier = earlier_releases(request.module, request.optimizer, request.data_loader)
        spender = spender_for(arguments.get("budget"), request, engine, earlier.releases)
        history = earlier.history(engine) if spender is None else spender.together(earlier.history(engine))
        times = accounted_compositions(len(request.data_loader), request.privacy.sampling, passes)
        target = Target(epsilon, delta, request.rate, times, tuple(history))
        noise = noise_for(replace(target, tolerance=tolerance, accuracy=accuracy), engine.accountant)
        if spender is not None:
            spender.check((noise, request.rate), times, f"the {times} releases of target_epsilon={epsilon:g}")
    arguments |= {"privacy_unit": request.privacy.privacy_unit}  # items are read once
    made = inspect.unwrap(make_private_safe)(
        module=module,
        optimizer=optimizer,
        data_loader=data_loader,
        noise_multiplier=noise,
        max_grad_norm=max_grad_norm,
        privacy_engine=privacy_engine,
        **arguments,
    )
    return planned(made, epsilon, delta, times)


@all_or_nothing
def diagnose(
    *,
    module: nn.Module,
    optimizer: Optimizer,
    data_loader: DataLoader[Any],
    criterion: Callable[..., Any] | None = None,
    training_step: StepFunction | None = None,
    batch_first: bool = True,
    loss_reduction: str = "mean",
    poisson_sampling: bool = True,
    sampling: str | None = None,
    grad_sample_mode: str = "auto",
    augmentation: AugmentationMultiplicity | None = None,
    privacy_unit: Any = None,
    items_per_unit: int | None = None,
    norm: str = "group",
) -> Report:
    """The flow of :func:`make_private_safe`, dry: a report, and nothing is changed.

    Args:
        module: see :func:`make_private_safe`.
        optimizer: see :func:`make_private_safe`.
        data_loader: see :func:`make_private_safe`.
        criterion: see :func:`make_private_safe`.
        training_step: see :func:`make_private_safe`.
        batch_first: see :func:`make_private_safe`.
        loss_reduction: see :func:`make_private_safe`.
        poisson_sampling: see :func:`make_private_safe`.
        sampling: see :func:`make_private_safe`.
        grad_sample_mode: see :func:`make_private_safe`.
        augmentation: see :func:`make_private_safe`.
        privacy_unit: see :func:`make_private_safe`.
        items_per_unit: see :func:`make_private_safe`.
        norm: see :func:`make_private_safe`.

    Returns:
        The report; what would be refused is among its findings.
    """
    options = options_of({"max_grad_norm": 1.0, **locals()})
    check_objects(module, optimizer, data_loader)
    request = as_trained(Request(module, optimizer, data_loader, criterion, training_step, *options))
    request, _ = _checked(request, 0.0, {})
    with no_meta_default(), rng_untouched(), Surgery(request.scan) as surgery:
        try:
            prepared = prepare(request, surgery)
        except DPFixError as error:
            return Report(type(request.module).__name__, error.findings, versions=versions())
    return prepared.report(request, None)


class SafePrivacyEngine(CheckpointingEngine):
    """Opacus's privacy engine with the safe calls, for scripts that change one import only."""

    def make_private(self, **arguments: Any) -> PrivateTraining:  # type: ignore[override]
        """:func:`make_private_safe` with this engine's accountant.

        Args:
            **arguments: see :func:`make_private_safe`.

        Returns:
            See :func:`make_private_safe`.
        """
        return make_private_safe(privacy_engine=self, **arguments)

    def make_private_with_epsilon(self, **arguments: Any) -> PrivateTraining:  # type: ignore[override]
        """:func:`make_private_safe_with_epsilon` with this engine's accountant.

        Args:
            **arguments: see :func:`make_private_safe_with_epsilon`.

        Returns:
            See :func:`make_private_safe`.
        """
        return make_private_safe_with_epsilon(privacy_engine=self, **arguments)


def options_of(asked: Mapping[str, Any]) -> tuple[PrivacyOptions, PerformanceOptions]:
    """What a call asks for.

    Args:
        asked: arguments of :func:`make_private_safe` by name, others are left out; one that is not given has its default.

    Returns:
        What decides what is released, and how it is computed.
    """
    values = {name: argument.default for name, argument in _ARGUMENTS.items()} | dict(asked)
    privacy, performance = (
        {f.name: values[f.name] for f in fields(kind)} for kind in (PrivacyOptions, PerformanceOptions)
    )
    return PrivacyOptions(**privacy), PerformanceOptions(**performance)


def _engine(given: PrivacyEngine | None, secure_mode: Any, accountant: Any) -> PrivacyEngine:
    """The engine of the call."""
    secure_mode = truth("secure_mode", secure_mode)
    if given is None:
        return SafePrivacyEngine(secure_mode=secure_mode, accountant="prv" if accountant is None else accountant)
    check_given_engine(given, secure_mode, accountant)
    return given


def _checked(
    request: Request, noise_multiplier: Any, further: Mapping[str, Any], engine: PrivacyEngine | None = None
) -> tuple[Request, dict[str, Any]]:
    """The request with plain values, and plain further options of Opacus's optimizers."""
    check_objects(request.module, request.optimizer, request.data_loader, engine)
    check_functions(request.criterion, request.training_step)
    request = replace(
        request, privacy=plain_privacy(request.privacy), performance=plain_performance(request.performance)
    )
    check_values(request.privacy, request.performance, request.module, noise_multiplier)
    check_augmentation(request.privacy)
    known = [name for name in _ARGUMENTS if name != "options"]
    check_names(further, option_names(opacus_clipping(request.privacy.clipping), "hooks"), [*known, *_SEARCH])
    return by_person(by_parameter(request)), plain_options(
        request.privacy.clipping, float(plain(noise_multiplier)), further
    )


_SEARCH = ("epsilon_tolerance", *ACCURACY)
"""Options of the search for the noise."""

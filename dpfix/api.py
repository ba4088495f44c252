"""The entry points: check the arguments, prepare (:mod:`dpfix.pipeline`), hand off to Opacus."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from opacus import PrivacyEngine
from opacus.accountants.utils import get_noise_multiplier
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from dpfix.choose.settings import versions
from dpfix.distributed import Ranks, fingerprint
from dpfix.engines import BY_NAME
from dpfix.errors import ArgumentError, DPFixError, RankError
from dpfix.instrument.rng import rng_untouched
from dpfix.observe.training_step import StepFunction
from dpfix.pipeline import Request, prepare, refuse, warn_blocked
from dpfix.plan import Plan
from dpfix.repair.surgery import Surgery
from dpfix.report.report import Report
from dpfix.rules import RULES, compiled
from dpfix.sampling.augmentation import AugmentationMultiplicity
from dpfix.sampling.identity import identity
from dpfix.sampling.loader import views_of
from dpfix.sampling.rate import batch_size, index_set, sample_rate
from dpfix.scan.arguments import (
    check_augmentation,
    check_budget,
    check_delta,
    check_names,
    check_objects,
    check_ranks,
    check_values,
)
from dpfix.scan.options import Options
from dpfix.scan.scan import run_rules
from dpfix.training import checkpoint
from dpfix.training.handoff import Decided, Originals, PrivacySettings, end_earlier, hand_off, option_names
from dpfix.training.result import PrivateTraining


def make_private_safe(
    *,
    module: nn.Module,
    optimizer: Optimizer,
    data_loader: DataLoader[Any],
    noise_multiplier: float,
    max_grad_norm: float | list[float],
    criterion: Callable[..., Any] | None = None,
    training_step: StepFunction | None = None,
    privacy_engine: PrivacyEngine | None = None,
    batch_first: bool = True,
    loss_reduction: str = "mean",
    poisson_sampling: bool = True,
    clipping: str = "flat",
    noise_generator: torch.Generator | None = None,
    grad_sample_mode: str = "auto",
    augmentation: AugmentationMultiplicity | None = None,
    wrap_model: bool = True,
    rand_on_empty: bool = False,
    norm: str = "group",
    no_grad_regions: bool = True,
    cache: bool = True,
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
        max_grad_norm: clip norm C of a sample's gradient; a list (one per parameter) for per-layer clipping.
        criterion: the loop's loss function, if ``training_step`` is not given.
        training_step: ``(model, batch) -> loss`` exactly as the loop computes it; inferred if not given.
        privacy_engine: an Opacus engine whose accountant is to be used; a new one if not given.
        batch_first: whether the samples are in dimension 0 (for Opacus's engines).
        loss_reduction: ``"mean"`` or ``"sum"`` over the samples.
        poisson_sampling: draw Poisson batches, as the accountant assumes; ``False`` leaves the loader alone.
        clipping: ``"flat"``, ``"per_layer"`` or ``"adaptive"``.
        noise_generator: source of the noise.
        grad_sample_mode: ``"auto"``, an engine's name, or ``"no_op"`` for a loop that fills ``grad_sample`` itself.
        augmentation: several views of every sample, averaged before clipping; the returned loader delivers them as rows
            next to each other. If not given, that of the earlier call from which ``data_loader`` comes.
        wrap_model: return Opacus's wrapper; ``False`` works on the model itself and keeps its state-dict keys.
        rand_on_empty: accepted for compatibility; an empty draw never reaches the model.
        norm: what replaces BatchNorm: ``"group"``, ``"instance"`` or ``"layer"``.
        no_grad_regions: run module calls that no gradient comes back to (``detach``) without a graph.
        cache: remember in the user's cache directory which engine was fastest for this model; it is audited all the same.
        **options: further options of Opacus's optimizers (adaptive clipping).

    Returns:
        A tuple ``(model, optimizer, data_loader)`` with ``report``, ``plan`` and the privacy accounting.

    Raises:
        ArgumentError: an argument cannot be used.
        DPFixError: something keeps the guarantee from holding; the subclass and the message say what and where.
        RankError: another of the processes that make this call together cannot, or makes another call.
    """
    call = _call(
        module,
        optimizer,
        data_loader,
        criterion=criterion,
        training_step=training_step,
        batch_first=batch_first,
        loss_reduction=loss_reduction,
        grad_sample_mode=grad_sample_mode,
        augmentation=augmentation,
        norm=norm,
        clipping=clipping,
        max_grad_norm=max_grad_norm,
        poisson_sampling=poisson_sampling,
        no_grad_regions=no_grad_regions,
        cache=cache,
    )
    engine = privacy_engine if privacy_engine is not None else SafePrivacyEngine()
    with call.ranks.all_or_none():
        _check(call, noise_multiplier, options)
        check_ranks(call.ranks, call.options, engine.secure_mode)
        if not wrap_model and grad_sample_mode != "auto" and BY_NAME[grad_sample_mode].needs_wrapper:
            raise ArgumentError(
                f"grad_sample_mode={grad_sample_mode!r} needs wrap_model=True: Opacus's expanded weights work through its "
                "wrapper. Pass wrap_model=True, or leave grad_sample_mode at 'auto'."
            )
        with rng_untouched(only_on_error=True), Surgery(call.scan) as surgery:
            prepared = prepare(call, surgery)
            call.ranks.check_same(_what_is_trained(call, prepared.plan, noise_multiplier))
            made = hand_off(
                _opacus_make_private(engine),
                engine,
                Originals(call.module, call.optimizer, data_loader),
                Decided(prepared.plan, prepared.placeholder, prepared.known_rows, call.augmentation, call.ranks),
                PrivacySettings(
                    poisson_sampling,
                    wrap_model,
                    {
                        "noise_multiplier": noise_multiplier,
                        "max_grad_norm": _clip_norms(call, prepared.plan.frozen_parameters),
                        "clipping": clipping,
                        "noise_generator": noise_generator,
                        **options,
                    },
                ),
            )
            try:
                call.ranks.exchange("handed off")
            except RankError:
                end_earlier(call.module)
                raise
            surgery.commit()
    report = prepared.report(call, noise_multiplier)
    warn_blocked(report)
    return PrivateTraining(made, report, engine)


def make_private_safe_with_epsilon(
    *,
    module: nn.Module,
    optimizer: Optimizer,
    data_loader: DataLoader[Any],
    target_epsilon: float,
    target_delta: float,
    epochs: int,
    max_grad_norm: float | list[float],
    privacy_engine: PrivacyEngine | None = None,
    **arguments: Any,
) -> PrivateTraining:
    """As :func:`make_private_safe`, with the noise that reaches a privacy budget after some epochs.

    Args:
        module: see :func:`make_private_safe`.
        optimizer: see :func:`make_private_safe`.
        data_loader: see :func:`make_private_safe`.
        target_epsilon: the budget after ``epochs`` epochs.
        target_delta: its delta; smaller than 1 / number of samples.
        epochs: number of passes over the returned loader.
        max_grad_norm: see :func:`make_private_safe`.
        privacy_engine: see :func:`make_private_safe`.
        **arguments: all other arguments of :func:`make_private_safe`, and options of Opacus's noise search.

    Returns:
        See :func:`make_private_safe`.

    Raises:
        ArgumentError: the budget cannot be reached, or an argument is out of range.
    """
    search = {k: arguments.pop(k) for k in tuple(arguments) if k in _noise_search_options()}
    given = {k: v for k, v in arguments.items() if k in inspect.signature(_call).parameters}
    call = _call(module, optimizer, data_loader, max_grad_norm=max_grad_norm, **given)
    engine = privacy_engine if privacy_engine is not None else SafePrivacyEngine()
    with call.ranks.all_or_none():
        check_delta(target_delta)
        check_budget(target_epsilon, epochs)
        options = {k: v for k, v in arguments.items() if k not in inspect.signature(make_private_safe).parameters}
        _check(call, 0.0, options)
        refuse(run_rules(call.scan, RULES))  # what can be refused at once is, before the search for the noise
        try:
            noise = get_noise_multiplier(
                target_epsilon=target_epsilon,
                target_delta=target_delta,
                sample_rate=sample_rate(data_loader),
                steps=epochs * len(data_loader),
                accountant=engine.accountant.mechanism(),
                **search,
            )
        except ValueError as error:
            raise ArgumentError(
                f"target_epsilon={target_epsilon} at target_delta={target_delta} cannot be reached in {epochs} epochs: {error} "
                "Raise target_epsilon, train fewer epochs, or use a smaller batch_size (a lower sampling rate)."
            ) from error
    return make_private_safe(
        module=module,
        optimizer=optimizer,
        data_loader=data_loader,
        noise_multiplier=noise,
        max_grad_norm=max_grad_norm,
        privacy_engine=engine,
        **arguments,
    )


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
    grad_sample_mode: str = "auto",
    augmentation: AugmentationMultiplicity | None = None,
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
        grad_sample_mode: see :func:`make_private_safe`.
        augmentation: see :func:`make_private_safe`.
        norm: see :func:`make_private_safe`.

    Returns:
        The report; what would be refused is among its findings.
    """
    options = Options(grad_sample_mode, norm, "flat", 1.0, poisson_sampling)
    call = Request(
        compiled.unwrap(module),
        optimizer,
        data_loader,
        criterion,
        training_step,
        batch_first,
        loss_reduction,
        options,
        _views(augmentation, data_loader),
    )
    _check(call, 0.0, {})
    with rng_untouched(), Surgery(call.scan) as surgery:
        try:
            prepared = prepare(call, surgery)
        except DPFixError as error:
            return Report(type(call.module).__name__, error.findings, versions=versions())
    return prepared.report(call, None)


class SafePrivacyEngine(PrivacyEngine):
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

    def save_checkpoint(  # type: ignore[override]
        self,
        *,
        path: Any,
        module: nn.Module,
        optimizer: Any = None,
        data_loader: Any = None,
        noise_scheduler: Any = None,
        grad_clip_scheduler: Any = None,
        checkpoint_dict: dict[str, Any] | None = None,
        torch_save_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Save a private training so that it goes on, from the end of an epoch, exactly as it would have.

        Args:
            path: file name or binary file.
            module: the model, wrapped or not.
            optimizer: the private optimizer.
            data_loader: the private loader; needed if it has a generator of its own.
            noise_scheduler: a scheduler of Opacus.
            grad_clip_scheduler: a scheduler of Opacus.
            checkpoint_dict: further entries of tensors and plain values.
            torch_save_kwargs: further arguments of ``torch.save``.
        """
        schedulers = {"noise_scheduler": noise_scheduler, "grad_clip_scheduler": grad_clip_scheduler}
        more, saving = checkpoint_dict or {}, torch_save_kwargs or {}
        objects = checkpoint.Objects(module, optimizer, data_loader, schedulers)
        checkpoint.save(self, path, objects, more, saving)

    def load_checkpoint(  # type: ignore[override]
        self,
        *,
        path: Any,
        module: nn.Module,
        optimizer: Any = None,
        data_loader: Any = None,
        noise_scheduler: Any = None,
        grad_clip_scheduler: Any = None,
        module_load_dict_kwargs: dict[str, Any] | None = None,
        torch_load_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Go on with a private training that was saved; make the same call of ``make_private`` first.

        Args:
            path: file name or binary file.
            module: the model, wrapped or not.
            optimizer: the private optimizer.
            data_loader: the private loader.
            noise_scheduler: a scheduler of Opacus.
            grad_clip_scheduler: a scheduler of Opacus.
            module_load_dict_kwargs: ``{"strict": False}`` tolerates weights that do not fit.
            torch_load_kwargs: further arguments of ``torch.load``; ``weights_only`` is on unless it is turned off here.

        Returns:
            What the file holds.
        """
        schedulers = {"noise_scheduler": noise_scheduler, "grad_clip_scheduler": grad_clip_scheduler}
        strict = bool((module_load_dict_kwargs or {}).get("strict", True))
        loading = torch_load_kwargs or {}
        objects = checkpoint.Objects(module, optimizer, data_loader, schedulers)
        return checkpoint.load(self, path, objects, strict, loading)


def _what_is_trained(call: Request, plan: Plan, noise_multiplier: float) -> dict[str, Any]:
    """What must be the same on all ranks, so that their clipped sums are those of one training."""
    if call.ranks.size == 1:
        return {}
    names = {id(p): name for name, p in call.module.named_parameters()}
    groups = call.optimizer.param_groups
    return (
        {
            "noise_multiplier": noise_multiplier,
            "the options of the call": str(call.options),
            "the number of samples": len(index_set(call.data_loader)),
            "the batch size": batch_size(call.data_loader),
            "the engine": plan.engine,
            "the loss reduction": plan.loss_reduction,
            "the weight of a sample": (plan.weighted_by_rows, plan.views),
            "what no gradient reaches": plan.frozen_parameters,
            "the optimizer": type(call.optimizer).__name__,
            "the order of the optimizer's parameters": [[names[id(p)] for p in g["params"]] for g in groups],
            "the options of the optimizer": [{k: str(v) for k, v in g.items() if k != "params"} for g in groups],
        }
        | identity(call.data_loader)
        | fingerprint(call.module)
    )


def _call(
    module: Any,
    optimizer: Any,
    data_loader: Any,
    *,
    max_grad_norm: Any,
    criterion: Callable[..., Any] | None = None,
    training_step: StepFunction | None = None,
    batch_first: bool = True,
    loss_reduction: str = "mean",
    grad_sample_mode: str = "auto",
    augmentation: AugmentationMultiplicity | None = None,
    norm: str = "group",
    no_grad_regions: bool = True,
    clipping: str = "flat",
    poisson_sampling: bool = True,
    cache: bool = True,
) -> Request:
    plain = _plain(module)
    return Request(
        plain,
        getattr(optimizer, "original_optimizer", optimizer),
        data_loader,
        criterion,
        training_step,
        batch_first,
        loss_reduction,
        Options(grad_sample_mode, norm, clipping, max_grad_norm, poisson_sampling, no_grad_regions, cache),
        _views(augmentation, data_loader),
        Ranks.of(plain),
    )


def _views(asked_for: Any, data_loader: Any) -> Any:
    """The loader of an earlier call goes on delivering views."""
    return views_of(data_loader) if asked_for is None and isinstance(data_loader, DataLoader) else asked_for


def _plain(module: Any) -> Any:
    """The user's own module: without ``torch.compile``, and out of a private training it is already in."""
    return end_earlier(compiled.unwrap(module)) if isinstance(module, nn.Module) else module


def _opacus_make_private(engine: PrivacyEngine) -> Callable[..., Any]:
    if isinstance(engine, SafePrivacyEngine):
        return super(SafePrivacyEngine, engine).make_private
    return engine.make_private


def _check(call: Request, noise_multiplier: float, options: dict[str, Any]) -> None:
    check_objects(call.module, call.optimizer, call.data_loader)
    check_values(call.options, call.module, call.loss_reduction, noise_multiplier)
    check_augmentation(call.augmentation, call.options)
    known = [name for name in inspect.signature(make_private_safe).parameters if name != "options"]
    check_names(options, option_names(call.options.clipping, "hooks"), known)


def _clip_norms(call: Request, frozen: tuple[str, ...]) -> Any:
    """The clip norms of the parameters that are still trained."""
    value = call.options.max_grad_norm
    if not isinstance(value, (list, tuple)):
        return value
    names = [n for n, p in call.module.named_parameters() if p.requires_grad or n in frozen]
    return [v for n, v in zip(names, value, strict=True) if n not in frozen]


def _noise_search_options() -> frozenset[str]:
    fixed = {"target_epsilon", "target_delta", "sample_rate", "epochs", "steps", "accountant", "kwargs"}
    return frozenset(inspect.signature(get_noise_multiplier).parameters) - fixed

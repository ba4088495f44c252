"""The entry points. The flow below reads as prose: scan, repair, observe, audit, choose, hand off."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from opacus import PrivacyEngine
from opacus.accountants.utils import get_noise_multiplier
from opacus.validators import ModuleValidator
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from dpfix import audit, handoff, observe, probe, sampling, select
from dpfix.engines import BY_HAND, ENGINES
from dpfix.errors import ArgumentError, DPFixError, ModelError, UnknownArgumentError
from dpfix.findings import EngineEvidence, Finding, Fixability, Report, Severity
from dpfix.plan import Plan
from dpfix.rules import RULES, batch_norm, compiled
from dpfix.rules import data_loader as data_loader_rule
from dpfix.scan import Options, Scan, run_rules
from dpfix.statement import NOT_COVERED, PrivacyStatement
from dpfix.surgery import Surgery
from dpfix.traceless import rng_untouched
from dpfix.training_step import StepFunction, TrainingStep, infer

MODES = ("auto", *ENGINES, BY_HAND.name)
"""Legal values of ``grad_sample_mode``."""

_CLIPPING = ("flat", "per_layer", "adaptive")


class PrivateTraining(tuple[Any, ...]):
    """What the call returns: unpacks to ``(model, optimizer, data_loader)`` like Opacus's tuple.

    Attributes:
        report: what was found, changed and chosen.
        plan: how the model is being trained.
        privacy_engine: the engine whose accountant counts the steps.
    """

    report: Report
    plan: Plan
    privacy_engine: PrivacyEngine

    def __new__(cls, items: tuple[Any, ...], report: Report, plan: Plan, privacy_engine: PrivacyEngine) -> PrivateTraining:
        """Build the tuple.

        Args:
            items: model, optimizer and loader.
            report: the report.
            plan: the plan.
            privacy_engine: the engine.

        Returns:
            The tuple with its attributes.
        """
        self = super().__new__(cls, items)
        self.report, self.plan, self.privacy_engine = report, plan, privacy_engine
        return self

    def get_epsilon(self, delta: float) -> float:
        """Privacy loss of the steps made so far.

        Args:
            delta: probability in (0, 1) that the bound does not hold; smaller than 1 / number of samples.

        Returns:
            Epsilon; infinite without noise, 0 before the first step.

        Raises:
            ArgumentError: ``delta`` is not a number between 0 and 1.
        """
        _check_delta(delta)
        if not self.privacy_engine.accountant.history:
            return 0.0
        return float(self.privacy_engine.get_epsilon(delta))

    def statement(self, delta: float) -> PrivacyStatement:
        """The privacy statement for the steps made so far.

        Args:
            delta: see :meth:`get_epsilon`.

        Returns:
            Unit, adjacency, sampling, rate, steps, noise, clip norm, accountant, epsilon and what is not covered.
        """
        _, optimizer, loader = self
        poisson = isinstance(loader, sampling.PrivateDataLoader)
        samples = len(sampling.index_set(loader))
        cautions = []
        if delta >= 1 / samples:
            cautions.append(f"delta is not below 1 / samples = {1 / samples:.2g}; such a bound means little")
        if not poisson:
            cautions.append("batches were not Poisson samples, as the accountant assumes")
        if optimizer.noise_multiplier == 0:
            cautions.append("no noise was added: there is no privacy")
        engine = self.privacy_engine
        return PrivacyStatement(
            epsilon=self.get_epsilon(delta),
            delta=delta,
            unit="one item of the dataset",
            adjacency="add or remove one sample",
            sampling_used="Poisson" if poisson else "the loader's own order",
            sampling_assumed="Poisson",
            samples=samples,
            sampling_rate=sampling.sample_rate(loader),
            steps=sum(entry[-1] for entry in engine.accountant.history),
            noise_multiplier=float(optimizer.noise_multiplier),
            max_grad_norm=optimizer.max_grad_norm,
            accountant=engine.accountant.mechanism(),
            secure_rng=bool(engine.secure_mode),
            not_covered=NOT_COVERED,
            cautions=tuple(cautions),
        )


@dataclass(frozen=True)
class _Call:
    """One call: the user's objects and what is asked for."""

    module: nn.Module
    optimizer: Optimizer
    data_loader: DataLoader[Any]
    criterion: Callable[..., Any] | None
    training_step: StepFunction | None
    batch_first: bool
    loss_reduction: str
    options: Options

    @property
    def scan(self) -> Scan:
        return Scan(self.module, self.optimizer, self.data_loader, self.options)


@dataclass(frozen=True)
class _Prepared:
    """Everything that was found out before the hand-off."""

    plan: Plan
    stand_in: Any
    findings: tuple[Finding, ...]
    evidence: tuple[EngineEvidence, ...]
    proofs: tuple[str, ...]


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
    wrap_model: bool = True,
    rand_on_empty: bool = False,
    norm: str = "group",
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
        wrap_model: return Opacus's wrapper; ``False`` works on the model itself and keeps its state-dict keys.
        rand_on_empty: accepted for compatibility; an empty draw never reaches the model.
        norm: what replaces BatchNorm: ``"group"``, ``"instance"`` or ``"layer"``.
        **options: further options of Opacus's optimizers (adaptive clipping).

    Returns:
        A tuple ``(model, optimizer, data_loader)`` with ``report``, ``plan`` and the privacy accounting.

    Raises:
        DPFixError: something keeps the guarantee from holding; the subclass and the message say what and where.
    """
    call = _Call(
        _plain(module),
        _original(optimizer),
        data_loader,
        criterion,
        training_step,
        batch_first,
        loss_reduction,
        Options(grad_sample_mode, norm, clipping, max_grad_norm, poisson_sampling),
    )
    _check_arguments(call, noise_multiplier, options)
    engine = privacy_engine if privacy_engine is not None else SafePrivacyEngine()
    with rng_untouched(only_on_error=True), Surgery(call.scan) as surgery:
        prepared = _prepare(call, surgery)
        made = handoff.hand_off(
            _opacus_make_private(engine),
            engine,
            module=call.module,
            optimizer=call.optimizer,
            data_loader=data_loader,
            plan=prepared.plan,
            stand_in=prepared.stand_in,
            poisson_sampling=poisson_sampling,
            wrap_model=wrap_model,
            noise_multiplier=noise_multiplier,
            max_grad_norm=_clip_norms(call, prepared.plan),
            clipping=clipping,
            noise_generator=noise_generator,
            **options,
        )
        surgery.commit()
    report = _report(call, prepared, noise_multiplier)
    return PrivateTraining(made, report, prepared.plan, engine)


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
    _check_delta(target_delta)
    if not (target_epsilon > 0 and epochs > 0):
        raise ArgumentError(
            f"target_epsilon={target_epsilon} and epochs={epochs} must be positive: they are the budget and the number of "
            "passes over data_loader it is to last for. Pass for example target_epsilon=8.0, epochs=20."
        )
    engine = privacy_engine if privacy_engine is not None else SafePrivacyEngine()
    search = {k: arguments.pop(k) for k in tuple(arguments) if k in _noise_search_options()}
    _check_loader(data_loader, arguments.get("poisson_sampling", True), module, optimizer)
    try:
        noise = get_noise_multiplier(
            target_epsilon=target_epsilon,
            target_delta=target_delta,
            sample_rate=sampling.sample_rate(data_loader),
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
        norm: see :func:`make_private_safe`.

    Returns:
        The report; what would be refused is among its findings.
    """
    options = Options(grad_sample_mode, norm, "flat", 1.0, poisson_sampling)
    call = _Call(
        compiled.unwrap(module), optimizer, data_loader, criterion, training_step, batch_first, loss_reduction, options
    )
    _check_arguments(call, 0.0, {})
    with rng_untouched(), Surgery(call.scan) as surgery:
        try:
            prepared = _prepare(call, surgery)
        except DPFixError as error:
            return Report(type(call.module).__name__, error.findings or (_as_finding(error),), versions=_versions())
    return _report(call, prepared, None)


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


# ------------------------------------------------------------------ the flow


def _prepare(call: _Call, surgery: Surgery) -> _Prepared:
    """Scan, repair, observe, audit, choose. Leaves the repaired model, and nothing else, behind."""
    found = _scan(call)
    surgery.repair(found)
    with rng_untouched():
        samples = probe.take(call.data_loader)
    step = infer(samples.batch, call.criterion, call.training_step)
    if observe.materialise(call.module, step, samples):
        later = _scan(call)
        surgery.repair(later)
        found = tuple(dict.fromkeys(found + later))
    findings = [finding for _, finding in found]
    _check_validator(call, findings)

    record = observe.observe(call.module, step, samples)
    audit.check_state(call.module, record)
    findings += _freeze(call, surgery, record)
    plan = Plan(
        engine="",
        opacus_mode="",
        calls=record.calls,
        loss_reduction=call.loss_reduction,
        batch_first=call.batch_first,
        frozen_parameters=record.unused,
        fixed_norms=tuple(path for path, _ in call.scan.modules(_BatchNorm)),
    )
    wanted = audit.reference(record)
    proofs = audit.check_isolation(call.module, step, samples, record, plan)
    plan, evidence = select.choose(
        call.module,
        step,
        samples,
        record,
        plan,
        wanted,
        call.options.grad_sample_mode,
        sampling.batch_size(call.data_loader),
    )
    findings += _notes(call, step, record)
    stand_in = observe.stand_in(call.module, step, samples, record)
    return _Prepared(plan, stand_in, tuple(findings), evidence, (*proofs, *_exactness(plan, evidence, wanted)))


def _scan(call: _Call) -> tuple[tuple[Any, Finding], ...]:
    found = run_rules(call.scan, RULES)
    refused = [(rule, finding) for rule, finding in found if finding.refused]
    if refused:
        raise refused[0][0].ERROR("\n".join(str(f) for _, f in refused), [f for _, f in refused])
    return found


def _check_validator(call: _Call, findings: list[Finding]) -> None:
    """Whatever Opacus's own validator still flags must have been answered by a finding; nothing slips through."""
    answered = {f.path for f in findings}
    for path, child in call.module.named_modules():
        validator = ModuleValidator.VALIDATORS.get(type(child))
        if validator is None or path in answered or not any(p.requires_grad for p in child.parameters()):
            continue
        for error in validator(child):
            raise ModelError(
                f"DPF018 [blocks-training] {call.scan.place(path)} is refused by Opacus's ModuleValidator: {error}\n"
                "  help: replace the layer as the message says, or freeze it with requires_grad_(False)."
            )


def _freeze(call: _Call, surgery: Surgery, record: observe.StepRecord) -> list[Finding]:
    if not record.unused or record.together.used == frozenset():
        return []
    for name in record.unused:
        surgery.freeze(call.module.get_parameter(name))
    shown = ", ".join(f"`{n}`" for n in record.unused[:3]) + (", ..." if len(record.unused) > 3 else "")
    return [
        Finding(
            "DPF017",
            Severity.BLOCKS_TRAINING,
            Fixability.EXACT,
            f"no gradient reaches {len(record.unused)} trainable parameter(s) of {type(call.module).__name__}: {shown}.",
            "noise would be all they ever receive; Opacus stops with 'Per sample gradient is not initialized'.",
            "frozen (requires_grad=False) while training privately; to_standard_module() gives it back",
            "if they should be trained, look for a detach, a weight of 0 in the loss, or a missing training_step.",
            record.unused[0],
        )
    ]


def _notes(call: _Call, step: TrainingStep, record: observe.StepRecord) -> list[Finding]:
    notes = []
    if not step.loss_known:
        notes.append(
            Finding(
                "DPF020",
                Severity.ADVICE,
                Fixability.NOTHING,
                f"the loop's loss is not known ({step.origin}).",
                "a loss that couples the samples (batch Dice, class weights with mean, ignore_index) is not noticed.",
                help="pass criterion= or training_step= to have the loss checked too.",
                path="training_step",
            )
        )
    if record.constant_writes:
        notes.append(
            Finding(
                "DPF021",
                Severity.ADVICE,
                Fixability.NOTHING,
                f"forward writes `{record.constant_writes[0]}` ({len(record.constant_writes)} piece(s) of state).",
                "what is written was the same for different samples, so nothing leaks.",
                path=record.constant_writes[0],
            )
        )
    if call.options.poisson_sampling and sampling.draws_with_replacement(call.data_loader):
        notes.append(
            Finding(
                "DPF022",
                Severity.ADVICE,
                Fixability.NOTHING,
                "data_loader draws with replacement; the private loader draws Poisson batches instead.",
                "the accountant assumes that every sample enters a batch independently, at most once.",
                path="data_loader",
            )
        )
    return notes


def _exactness(plan: Plan, evidence: tuple[EngineEvidence, ...], wanted: audit.Reference) -> tuple[str, ...]:
    chosen = next(e for e in evidence if e.engine == plan.engine)
    if chosen.max_error is None:
        return ("exact: not shown, the script computes per-sample gradients itself",)
    return (
        f"exact: the clipped sum of {len(wanted.gradients)} samples equals the batch-of-one reference at 3 clip norms, "
        f"largest relative error {chosen.max_error:.1e} (allowed {wanted.tolerance:.0e})",
    )


def _report(call: _Call, prepared: _Prepared, noise_multiplier: float | None) -> Report:
    loader = call.data_loader
    settings = {
        "noise multiplier": "not set" if noise_multiplier is None else f"{noise_multiplier:g}",
        "clip norm": str(call.options.max_grad_norm),
        "clipping": call.options.clipping,
        "samples": str(len(sampling.index_set(loader))),
        "sampling": f"Poisson, rate {sampling.sample_rate(loader):.6g}"
        if call.options.poisson_sampling
        else "the loader's own",
        "expected batch size": f"{sampling.batch_size(loader):g}",
        "loss reduction": call.loss_reduction,
    }
    return Report(
        type(call.module).__name__,
        prepared.findings,
        prepared.plan.engine,
        prepared.evidence,
        prepared.proofs,
        settings,
        _versions(),
    )


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("torch", "opacus")}


def _as_finding(error: DPFixError) -> Finding:
    text = str(error)
    code = text.split(" ", 1)[0] if text.startswith("DPF") else "DPF000"
    return Finding(code, Severity.BREAKS_GUARANTEE, Fixability.REFUSED, text, type(error).__name__)


# ------------------------------------------------------------------ arguments


def _plain(module: nn.Module) -> nn.Module:
    return handoff.end_earlier(compiled.unwrap(module)) if isinstance(module, nn.Module) else module


def _original(optimizer: Any) -> Any:
    return getattr(optimizer, "original_optimizer", optimizer)


def _opacus_make_private(engine: PrivacyEngine) -> Callable[..., Any]:
    if isinstance(engine, SafePrivacyEngine):
        return super(SafePrivacyEngine, engine).make_private
    return engine.make_private


def _check_arguments(call: _Call, noise_multiplier: float, options: dict[str, Any]) -> None:
    for name, value, kind in (
        ("module", call.module, nn.Module),
        ("optimizer", call.optimizer, Optimizer),
        ("data_loader", call.data_loader, DataLoader),
    ):
        if not isinstance(value, kind):
            raise ArgumentError(
                f"{name} is {type(value).__name__}, not a {kind.__module__}.{kind.__qualname__}. "
                f"Pass the {name} that the training loop uses."
            )
    _check_choice("loss_reduction", call.loss_reduction, ("mean", "sum"))
    _check_choice("grad_sample_mode", call.options.grad_sample_mode, MODES)
    _check_choice("norm", call.options.norm, batch_norm.NORMS)
    _check_choice("clipping", call.options.clipping, _CLIPPING)
    if not (isinstance(noise_multiplier, (int, float)) and 0 <= noise_multiplier < math.inf):
        raise ArgumentError(
            f"noise_multiplier={noise_multiplier!r} must be a finite number >= 0: the noise's standard deviation as a "
            "multiple of max_grad_norm. Typical values are 0.5 to 2."
        )
    _check_clip_norm(call)
    legal = handoff.option_names(call.options.clipping, "hooks")
    for name in options:
        if name not in legal:
            raise UnknownArgumentError(_unknown(name, legal))


def _check_choice(name: str, value: str, legal: tuple[str, ...]) -> None:
    if value in legal:
        return
    near = difflib.get_close_matches(str(value), legal, n=1)
    raise ArgumentError(
        f"{name}={value!r} is not one of {', '.join(map(repr, legal))}." + (f" Did you mean {near[0]!r}?" if near else "")
    )


def _check_clip_norm(call: _Call) -> None:
    value = call.options.max_grad_norm
    values = value if isinstance(value, (list, tuple)) else [value]
    if not values or not all(isinstance(v, (int, float)) and 0 < v < math.inf for v in values):
        raise ArgumentError(
            f"max_grad_norm={value!r} must be a positive finite number (or a list of them for clipping='per_layer'): the "
            "largest Euclidean norm a sample's gradient keeps."
        )
    trainable = sum(p.requires_grad for p in call.module.parameters())
    per_layer = call.options.clipping == "per_layer"
    if per_layer != isinstance(value, (list, tuple)) or (per_layer and len(values) != trainable):
        raise ArgumentError(
            f"max_grad_norm has {len(values)} value(s) for clipping='{call.options.clipping}' and {trainable} trainable "
            "parameters. Pass one number for flat or adaptive clipping, and one number per trainable parameter, in the "
            "order of module.parameters(), for clipping='per_layer'."
        )


def _clip_norms(call: _Call, plan: Plan) -> Any:
    """The clip norms of the parameters that are still trained."""
    value = call.options.max_grad_norm
    if not isinstance(value, (list, tuple)):
        return value
    frozen = set(plan.frozen_parameters)
    names = [n for n, p in call.module.named_parameters() if p.requires_grad or n in frozen]
    return [v for n, v in zip(names, value, strict=True) if n not in frozen]


def _unknown(name: str, legal: frozenset[str]) -> str:
    known = [*inspect.signature(make_private_safe).parameters, *legal]
    near = difflib.get_close_matches(name, [k for k in known if k != "options"], n=1)
    hint = f" Did you mean `{near[0]}`?" if near else ""
    return f"make_private_safe() has no argument `{name}`.{hint} Opacus ignores unknown names silently; dpfix does not."


def _check_delta(delta: float) -> None:
    if not (isinstance(delta, (int, float)) and 0 < delta < 1):
        raise ArgumentError(
            f"delta={delta!r} must lie between 0 and 1, and should be smaller than 1 / number of samples. It is the "
            "probability with which the bound may fail. Pass for example delta=1e-5."
        )


def _check_loader(loader: Any, poisson: bool, module: nn.Module, optimizer: Any) -> None:
    """The loader's rules, before anything is computed from it."""
    scan = Scan(module, optimizer, loader, Options(poisson_sampling=poisson))
    for finding in data_loader_rule.find(scan):
        raise data_loader_rule.ERROR(str(finding), [finding])


def _noise_search_options() -> frozenset[str]:
    fixed = {"target_epsilon", "target_delta", "sample_rate", "epochs", "steps", "accountant", "kwargs"}
    return frozenset(inspect.signature(get_noise_multiplier).parameters) - fixed

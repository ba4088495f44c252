"""The proof: what an engine releases for the probe equals the clipped sum of a batch-of-one reference.

The reference is independent of every engine: the plain model, the user's training step, one sample at a time, ordinary
autograd (:mod:`dpfix.observe`). Clipping is Opacus's own, so what is compared is what the optimizer would release.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from opacus.optimizers import DPOptimizer
from torch import nn

from dpfix import layout, trees
from dpfix.engines import Engine
from dpfix.errors import (
    CoupledLossError,
    CoupledModelError,
    DPFixError,
    LossError,
    ModelError,
    StateWrittenError,
    TrainingStepError,
)
from dpfix.findings import EngineEvidence
from dpfix.observe import Gradients, StepRecord
from dpfix.plan import Plan
from dpfix.probe import Probe
from dpfix.scan import place
from dpfix.traceless import FixedRandomness, traceless
from dpfix.training_step import TrainingStep

_EPS = 1e-6  # Opacus adds it to every norm; see DPOptimizer.clip_and_accumulate


@dataclass(frozen=True)
class Reference:
    """Per-sample gradients from batches of one.

    Attributes:
        gradients: one mapping per sample, for the parameters that are trained.
        norms: their Euclidean norms, shape ``[samples]``.
        tolerance: relative error that is allowed for this precision.
    """

    gradients: tuple[Gradients, ...]
    norms: torch.Tensor
    tolerance: float

    @cached_property
    def clip_norms(self) -> tuple[float, float, float]:
        """A clip norm that clips everything, one that clips half, one that clips nothing."""
        middle, largest = float(self.norms.median()), float(self.norms.max())
        return 0.05 * middle, middle, 2 * largest

    @cached_property
    def clipped_sums(self) -> tuple[Gradients, ...]:
        """The clipped sum for each of :attr:`clip_norms`."""
        return tuple(self.clipped_sum(clip_norm) for clip_norm in self.clip_norms)

    def clipped_sum(self, clip_norm: float) -> Gradients:
        """``sum_i min(1, C / |g_i|) g_i`` in double precision.

        Args:
            clip_norm: C.

        Returns:
            The sum by parameter name.
        """
        out: Gradients = {}
        for gradient, norm in zip(self.gradients, self.norms, strict=True):
            factor = min(1.0, clip_norm / (float(norm) + _EPS))
            for name, value in gradient.items():
                if name in out:
                    out[name].add_(value, alpha=factor)
                else:
                    out[name] = value.double().mul_(factor)
        return out


def reference(record: StepRecord) -> Reference:
    """The batch-of-one reference of a recorded step.

    Args:
        record: what the probe showed.

    Returns:
        The reference over the parameters that are trained.

    Raises:
        TrainingStepError: a sample alone has no gradient, or none that is finite.
    """
    gone = set(record.unused)
    gradients = tuple({n: g for n, g in run.gradients.items() if n not in gone} for run in record.alone)
    norms = torch.tensor([_norm(g) for g in gradients], dtype=torch.float64)
    if not bool(torch.isfinite(norms).all()):
        raise CoupledModelError(
            "the gradient of one sample alone is not finite, while DP-SGD needs it for every sample: the model or the "
            "loss in training_step divides by a statistic of the batch (a standard deviation over samples) or of "
            "a constant input. Make it per sample, or add an epsilon to the denominator."
        )
    low = record.low_precision
    dtypes = {g.dtype for run in record.alone for g in run.gradients.values()}
    return Reference(gradients, norms, 5e-2 if low else 1e-6 if dtypes == {torch.float64} else 2e-3)


def _norm(gradient: Mapping[str, torch.Tensor]) -> float:
    return sum(float(torch.linalg.vector_norm(g, dtype=torch.float64)) ** 2 for g in gradient.values()) ** 0.5


def relative_error(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> tuple[float, str]:
    """The largest error of one parameter, relative to its own norm or 5 % of the whole.

    Args:
        found: what an engine released.
        wanted: the reference.

    Returns:
        The error, infinite if a parameter is missing or not finite, and the name of the parameter.
    """
    total = _norm(wanted)
    worst, where = 0.0, ""
    for name, value in wanted.items():
        got = found.get(name)
        if got is None:
            return float("inf"), name
        error = float((got.double() - value).norm()) / max(float(value.norm()), 0.05 * total, 1e-12)
        if not error <= worst:
            worst, where = (error if error == error else float("inf")), name
    return worst, where


# ------------------------------------------------------------------ the model and the loss


def check_state(module: nn.Module, record: StepRecord) -> None:
    """Refuse a model whose forward pass keeps something of the samples.

    Args:
        module: the model.
        record: what the probe showed.

    Raises:
        StateWrittenError: state that depends on the samples was written.
    """
    if not record.sample_writes:
        return
    name = record.sample_writes[0]
    owner = name.rpartition(".")[0]
    raise StateWrittenError(
        f"DPF012 [breaks-guarantee] forward writes `{name}` ({place(module, owner)}), and what is written depends on "
        f"the samples ({len(record.sample_writes)} such piece(s) of state).\n"
        "  why:  a running average, a codebook, a cache or an initialisation from the first batch leaves the training "
        "without noise.\n"
        "  help: compute it outside the private training on public data and keep it fixed, make it a trainable "
        "parameter, or do not keep it between batches."
    )


def check_isolation(module: nn.Module, step: TrainingStep, probe: Probe, record: StepRecord, plan: Plan) -> list[str]:
    """Sample i must not feel sample j: first in the model's outputs, then in the loss.

    Args:
        module: the repaired model.
        step: from batch to loss.
        probe: the samples.
        record: what the probe showed.
        plan: for the loss reduction.

    Returns:
        One line per proof, for the report.

    Raises:
        CoupledModelError: an output of the model mixes samples.
        CoupledLossError: the loss is no mean (or sum) of per-sample losses.
        LossError: its reduction is not the one that was announced.
    """
    tolerance = reference(record).tolerance
    coupled = _coupled_output(record, tolerance)
    if coupled:
        culprit = _first_coupled_module(module, step, probe, tolerance)
        raise CoupledModelError(
            f"DPF013 [breaks-guarantee] {culprit or place(module, '')} mixes the samples of a batch: {coupled}.\n"
            "  why:  sample i's output depends on sample j, so clipping per sample bounds nothing.\n"
            "  help: replace what is computed over dimension 0 (a mean, a normalisation, an attention over the "
            "batch) by something per sample. training_step was run on the whole probe batch and on single samples."
        )
    _check_loss(module, record, plan, step, tolerance)
    kind = "loss" if step.loss_known else "stand-in loss"
    return [
        f"isolated: outputs of the model in a batch of {len(probe)} equal those of single samples",
        f"isolated: the gradient of the batch is the {plan.loss_reduction} of the single samples' ({kind}: "
        f"{step.origin})",
    ]


def _coupled_output(record: StepRecord, tolerance: float) -> str:
    for number, call in enumerate(record.together.calls):
        whole = trees.tensors(call.output)
        parts = [trees.tensors(run.calls[number].output) for run in record.alone if number < len(run.calls)]
        for k, tensor in enumerate(whole):
            if not tensor.is_floating_point():
                continue
            problem = _differs(tensor, [p[k] for p in parts if k < len(p)], tolerance)
            if problem:
                return problem
    return ""


def _differs(whole: torch.Tensor, parts: list[torch.Tensor], tolerance: float) -> str:
    """Why a tensor of the batch is not made of the tensors of single samples; empty if it is, or cannot be told."""
    dim, problem = layout._sample_dim(whole, parts)
    if problem or dim is None:
        return ""
    for i, part in enumerate(parts):
        taken = dim.take(whole, i, len(parts))
        if taken.shape != part.shape:
            return ""
        scale = max(float(part.abs().max()) if part.numel() else 0.0, 1e-6)
        gap = float((taken - part).abs().max()) / scale if part.numel() else 0.0
        if not gap <= 10 * tolerance:
            return f"the output for one sample alone differs by {gap:.1e} (relative) from the one in a batch"
    return ""


def _first_coupled_module(module: nn.Module, step: TrainingStep, probe: Probe, tolerance: float) -> str:
    """The first module, in the order of execution, whose output mixes samples."""

    def outputs(batch: object) -> list[tuple[str, list[torch.Tensor]]]:
        seen: list[tuple[str, list[torch.Tensor]]] = []

        def hook(path: str) -> object:
            def record_output(m: nn.Module, a: object, out: object) -> None:
                seen.append((path, [t.detach().as_subclass(torch.Tensor) for t in trees.tensors(out)]))

            return record_output

        handles = [m.register_forward_hook(hook(path)) for path, m in module.named_modules()]  # type: ignore[arg-type]
        try:
            with traceless(module), FixedRandomness():
                step.run(module, batch)
        finally:
            for handle in handles:
                handle.remove()
        return seen

    whole = outputs(probe.batch)
    singles = [outputs(b) for b in probe.singles]
    for number, (path, tensors) in enumerate(whole):
        if any(number >= len(s) or s[number][0] != path for s in singles):
            return ""
        for k, tensor in enumerate(tensors):
            parts = [s[number][1][k] for s in singles if k < len(s[number][1])]
            if tensor.is_floating_point() and len(parts) == len(singles) and _differs(tensor, parts, tolerance):
                return place(module, path)
    return ""


def _check_loss(module: nn.Module, record: StepRecord, plan: Plan, step: TrainingStep, tolerance: float) -> None:
    samples = len(record.alone)
    scale = samples if plan.loss_reduction == "mean" else 1
    total = {n: g.double() * scale for n, g in record.together.gradients.items()}
    parts: Gradients = {}
    for run in record.alone:
        for name, g in run.gradients.items():
            parts[name] = parts.get(name, torch.zeros((), dtype=torch.float64)) + g.double()
    size = sum(_norm(run.gradients) for run in record.alone)
    error, name = _error_against(total, parts, size)
    if error <= 5 * tolerance:
        if size == 0:
            raise TrainingStepError(
                f"no parameter of {type(module).__name__} gets a gradient from training_step ({step.origin}). Check "
                "the loss, requires_grad of the parameters, and detach or no_grad in forward."
            )
        return
    other = "sum" if plan.loss_reduction == "mean" else "mean"
    factor = 1 / samples if plan.loss_reduction == "mean" else samples
    swapped = {n: g * factor for n, g in total.items()}
    if _error_against(swapped, parts, size)[0] <= 5 * tolerance:
        raise LossError(
            f"DPF015 [breaks-guarantee] the loss in training_step is a {other} over the samples, but loss_reduction="
            f"'{plan.loss_reduction}' was announced.\n"
            f"  why:  per-sample gradients would be scaled by the batch size before clipping.\n"
            f"  help: pass loss_reduction='{other}', or use reduction='{plan.loss_reduction}' in the criterion."
        )
    raise CoupledLossError(
        f"DPF014 [breaks-guarantee] the loss of the batch is not the {plan.loss_reduction} of the losses of its samples: "
        f"the gradient of `{name}` differs by {error:.1e} (relative) ({step.origin}).\n"
        "  why:  one sample's share of the loss depends on the others, so clipping per sample bounds nothing.\n"
        "  help: known causes are a mean over the valid elements of the batch (ignore_index), class weights with "
        "reduction='mean', batch=True or batch_dice in Dice losses, contrastive and rank losses. Compute the loss "
        "per sample and average: torch.stack([criterion(out[i:i+1], y[i:i+1]) for i in range(len(y))]).mean()."
    )


def _error_against(total: Gradients, parts: Gradients, size: float) -> tuple[float, str]:
    worst, where = 0.0, ""
    for name, value in parts.items():
        error = float((total[name] - value).norm()) / max(size, 1e-12)
        if not error <= worst:
            worst, where = (error if error == error else float("inf")), name
    return worst, where


# ------------------------------------------------------------------ the engines


def check_engine(
    engine: Engine, module: nn.Module, step: TrainingStep, probe: Probe, plan: Plan, wanted: Reference
) -> EngineEvidence:
    """Compare what an engine releases for the probe with the reference, at three clip norms.

    Args:
        engine: the engine.
        module: the repaired model.
        step: from batch to loss.
        probe: the samples.
        plan: how the model is to be trained with this engine.
        wanted: the batch-of-one reference.

    Returns:
        The evidence: passed, the largest error, or what went wrong.
    """
    try:
        sums = released_sums(engine, module, step, probe, plan, wanted.clip_norms)
    except (
        DPFixError, RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, NotImplementedError,
        AssertionError,
    ) as error:  # fmt: skip
        text = " ".join(str(error).split())[:160]
        return EngineEvidence(engine.name, passed=False, reason=f"{type(error).__name__}: {text}")
    worst, where = 0.0, ""
    for found, released in zip(sums, wanted.clipped_sums, strict=True):
        error, name = relative_error(found, released)
        if not error <= worst:
            worst, where = error, name
    if not worst <= wanted.tolerance:
        reason = f"its clipped sum differs from the batch-of-one reference by {worst:.1e} (`{where}`)"
        return EngineEvidence(engine.name, passed=False, max_error=worst, reason=reason)
    return EngineEvidence(engine.name, passed=True, max_error=worst)


def released_sums(
    engine: Engine,
    module: nn.Module,
    step: TrainingStep,
    probe: Probe,
    plan: Plan,
    clip_norms: tuple[float, ...],
) -> list[Gradients]:
    """The clipped sums that Opacus's optimizer would release for the probe, one per clip norm.

    Args:
        engine: the engine.
        module: the repaired model.
        step: from batch to loss.
        probe: the samples.
        plan: how the model is to be trained.
        clip_norms: the clip norms.

    Returns:
        One sum by parameter name for every clip norm. The model is afterwards as before.

    Raises:
        ModelError: gradient reached a parameter past the engine, or rows are missing.
    """
    parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
    with traceless(module):
        handle = engine.attach(module, plan)
        bypass = Bypass(parameters) if engine.opacus_mode == "no_op" else None
        try:
            with FixedRandomness():
                step.loss(handle.model, probe.batch).backward()
            counts = handle.collect(list(parameters.values()))
            if bypass is not None and bypass.names:
                raise ModelError(
                    f"gradient reached parameter `{bypass.names[0]}` past the model's forward: a penalty on weights in the "
                    "loss, or a part of the model called directly in training_step. Use the optimizer's "
                    "weight_decay for penalties, and call the model as a whole"
                )
            if counts != [len(probe)]:
                raise ModelError(f"per-sample gradients for {counts} rows instead of {len(probe)} samples")
            samples = {n: p.grad_sample for n, p in parameters.items()}  # type: ignore[attr-defined]
            return [_clip(parameters, samples, clip_norm, plan) for clip_norm in clip_norms]
        finally:
            if bypass is not None:
                bypass.remove()
            handle.detach()
            for p in parameters.values():
                for name in ("grad_sample", "summed_grad", "_forward_counter"):
                    if hasattr(p, name):
                        delattr(p, name)


def _clip(parameters: dict[str, nn.Parameter], samples: Gradients, clip_norm: float, plan: Plan) -> Gradients:
    optimizer = DPOptimizer(
        torch.optim.SGD(parameters.values(), lr=0.0),
        noise_multiplier=0.0,
        max_grad_norm=clip_norm,
        expected_batch_size=1,
        loss_reduction=plan.loss_reduction,
    )
    for name, p in parameters.items():
        p.grad_sample = samples[name].detach()  # type: ignore[attr-defined]
    optimizer.clip_and_accumulate()
    return {name: p.summed_grad.detach() for name, p in parameters.items()}  # type: ignore[attr-defined]


class Bypass:
    """Notices gradient that autograd adds to the real parameters, past an engine that uses aliases.

    Args:
        parameters: the trainable parameters by name.

    Attributes:
        names: parameters that such a gradient reached.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.names: list[str] = []
        self._handles = [
            p.register_post_accumulate_grad_hook(lambda _, name=name: self.names.append(name))
            for name, p in parameters.items()
        ]

    def clear(self) -> None:
        """Forget what was noticed."""
        self.names.clear()

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()


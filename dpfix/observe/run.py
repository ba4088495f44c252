"""Running the training step on the probe and writing down what really happens.

The step is run once on every sample alone and once on all of them together, on the plain (repaired) model. The
singles are at the same time the batch-of-one reference that the audit compares every engine with.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dpfix.errors import CoupledModelError, TrainingStepError
from dpfix.instrument.fixed_randomness import FixedRandomness
from dpfix.instrument.module_state import Key, put_back, same, traceless, written
from dpfix.instrument.rng import generator_states
from dpfix.instrument.source import describe_module
from dpfix.layout.infer import layout_of_calls, layout_of_layers
from dpfix.layout.row_count import row_counts
from dpfix.observe import double_activation
from dpfix.observe.failures import described_failures
from dpfix.observe.probe import Probe
from dpfix.observe.record import ModuleCall, Run, StepRecord
from dpfix.observe.recorder import StepLog, recorder
from dpfix.observe.training_step import TrainingStep


def observe(module: nn.Module, step: TrainingStep, probe: Probe, known: StepRecord | None = None) -> StepRecord:
    """Run the step on every sample alone and on all together.

    Args:
        module: the repaired model, in training mode.
        step: from batch to loss.
        probe: the samples.
        known: what the ordinary probe showed, if this one was made from it: samples that are the same are not run again,
            and functions and layers are not written down again.

    Returns:
        What was seen. The model, every generator and every gradient are afterwards as before, also if the step fails.
    """
    recording = StepLog()
    trainable = [name for name, p in module.named_parameters() if p.requires_grad]
    with traceless(module) as before:
        alone: list[Run] = []
        for number, batch in enumerate(probe.singles):
            same_as = probe.unchanged[number] if known is not None else None
            if known is not None and same_as is not None:
                run = known.alone[same_as]
                alone.append(replace(run, gradients={name: run.gradients[name] for name in trainable}))
                continue
            like = known.together if known is not None else alone[0] if alone else None
            alone.append(_run_alone(module, step, batch, before, probe, like, layers=known is None))
            if alone[-1].written:
                put_back(module, before)
        first = known is None
        like = alone[0] if known is None else known.together
        together = _run_like(like, module, step, probe.batch, before, recording, details=first, layers=first)
        put_back(module, before)
        used = together.used.union(*(run.used for run in alone))
        if together.random_modules and not used >= set(trainable):
            used |= _used_by_chance(module, step, probe, before)
        constant, dependent = _writes([*alone, together])
        scratch = _scratch(module, step, probe, before, alone[0], dependent) if known is None else known.scratch
    model_calls = [run.calls.get("", []) for run in (together, *alone)]
    counts = row_counts(model_calls[0], model_calls[1:])
    calls, problem = layout_of_calls(model_calls[0], model_calls[1:], counts)
    layers = layout_of_layers(together.calls, [run.calls for run in alone], counts) if known is None else known.layers
    return StepRecord(
        together=_root_only(together),
        alone=tuple(_root_only(run) for run in alone),
        calls=calls,
        layout_problem=problem,
        layers=layers,
        modules=_module_calls(recording),
        unused=tuple(name for name in trainable if name not in used),
        functional=dict(recording.functional),
        elsewhere=tuple((name, tuple(places)) for name, places in recording.elsewhere.items()),
        several=_several(module, recording),
        cuts={site: frozenset(numbers) for site, numbers in recording.detached.items()},
        in_place=tuple(recording.in_place),
        to_help=recording.to_help,
        constant_writes=tuple(map(_name, constant)),
        sample_writes=tuple(_name(key) for key in dependent if key not in scratch),
        scratch=scratch,
        counts=counts,
    )


def one_by_one(module: nn.Module, step: TrainingStep, probe: Probe) -> tuple[Run, ...]:
    """Run the step on every sample alone, without a look at what happens inside.

    Args:
        module: the model, in training mode.
        step: from batch to loss.
        probe: the samples.

    Returns:
        One run per sample. The model is afterwards as before.
    """
    runs: list[Run] = []
    with traceless(module) as before:
        for batch in probe.singles:
            like = runs[0] if runs else None
            runs.append(_run_like(like, module, step, batch, before, StepLog()))
            put_back(module, before)
    return tuple(runs)


def _run_alone(
    module: nn.Module,
    step: TrainingStep,
    batch: Any,
    before: dict[Key, Any],
    probe: Probe,
    like: Run | None,
    *,
    layers: bool,
) -> Run:
    """One sample alone; a model that runs on a batch only is one that needs the other samples."""
    notes = StepLog()
    try:
        return _run_like(like, module, step, batch, before, notes, layers=layers)
    except TrainingStepError as error:
        put_back(module, before)
        run_step(module, step, probe.batch, before)
        put_back(module, before)
        raise CoupledModelError(
            f"DPF013 [breaks-guarantee] {describe_module(module, notes.failed)} mixes the samples of a batch: it works on "
            f"{len(probe)} samples, but not on one alone: {error.__cause__}.\n"
            "  why:  a layer that needs several samples mixes them (a normalisation over the batch), so clipping per sample "
            "bounds nothing.\n"
            "  help: use a normalisation per sample (GroupNorm, LayerNorm) instead; a layer in eval() may also help."
        ) from error


def _run_like(
    like: Run | None,
    module: nn.Module,
    step: TrainingStep,
    batch: Any,
    before: dict[Key, Any],
    notes: StepLog,
    *,
    details: bool = False,
    layers: bool = False,
) -> Run:
    """The step on other samples; where an earlier run drew nothing, no operation is watched unless this one draws.

    Args:
        like: an earlier run of the same step, if there is one.
        module: the model.
        step: from batch to loss.
        batch: a collated batch.
        before: snapshot of the model's state.
        notes: where it is written down.
        details: whether to write down functions and gradients, too.
        layers: whether to write down the calls of the modules inside, too.

    Returns:
        What happened.
    """
    if like is not None and not (like.drew or like.low_precision):
        generators = generator_states()
        run = run_step(module, step, batch, before, notes, details=details, layers=layers, watched=False)
        if all(map(torch.equal, generators, generator_states())):
            return run
        put_back(module, before)
        notes.forget()
    return run_step(module, step, batch, before, notes, details=details, layers=layers)


def decided_by_rounding(module: nn.Module, step: TrainingStep, probe: Probe, tolerance: float) -> bool:
    """Whether a sample's gradient changes when the parameters move by as little as rounding does.

    A constant sample behind several normalisations is such a case: each divides by nearly nothing. Its gradient in a
    batch and alone may then differ without any coupling.

    Args:
        module: the repaired model.
        step: from batch to loss.
        probe: the samples.
        tolerance: relative change that counts.

    Returns:
        True if that is so for any of the samples.
    """
    generator = torch.Generator().manual_seed(0)
    with traceless(module) as before:
        for batch in probe.singles:
            still = run_step(module, step, batch, before).gradients
            with torch.no_grad():
                for p in module.parameters():
                    p.mul_(1 + 1e-6 * torch.randn(p.shape, generator=generator).to(p))
            moved = run_step(module, step, batch, before).gradients
            put_back(module, before)
            size = sum(float(g.double().square().sum()) for g in still.values()) ** 0.5
            change = sum(float((g - moved[n]).double().square().sum()) for n, g in still.items()) ** 0.5
            if not change <= tolerance * size:
                return True
    return False


def _root_only(run: Run) -> Run:
    """Activations of the layers are not needed once their layout is known."""
    return replace(run, calls={"": list(run.calls.get("", []))})


def run_step(
    module: nn.Module,
    step: TrainingStep,
    batch: Any,
    before: dict[Key, Any],
    recording: StepLog | None = None,
    *,
    details: bool = True,
    layers: bool = True,
    watched: bool = True,
) -> Run:
    """One forward and backward pass on the plain model with fixed randomness.

    Args:
        module: the model.
        step: from batch to loss.
        batch: a collated batch.
        before: snapshot of the model's state, to tell what was written.
        recording: where it is written down, if that is wanted.
        details: whether to write down functions and gradients, too.
        layers: whether to write down the calls of the modules inside, too.
        watched: whether to fix randomness, by a look at every operation; if not, the step must draw nothing.

    Returns:
        What happened.
    """
    details = details and recording is not None
    notes = StepLog() if recording is None else recording
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    for p in parameters.values():
        p.grad = None
    mode = FixedRandomness(notes.stack)
    with (
        recorder(module, notes, details=details, layers=layers and recording is not None),
        mode if watched else nullcontext(),
        described_failures(step),
    ):
        loss = step.loss(module, batch)
        repeated = double_activation.repeated(loss, notes.activations) if details else ()
        loss.backward()
    gradients = {n: _dense(p) for n, p in parameters.items()}
    used = frozenset(n for n, p in parameters.items() if p.grad is not None)
    for p in parameters.values():
        p.grad = None
    return Run(
        float(loss.detach()),
        gradients,
        used,
        notes.calls,
        written(module, before),
        frozenset().union(*mode.random_ops.values()) if mode.random_ops else frozenset(),
        mode.low_precision,
        bool(mode.random_ops),
        repeated,
    )


def _dense(p: nn.Parameter) -> torch.Tensor:
    if p.grad is None:
        return torch.zeros_like(p, memory_format=torch.contiguous_format)
    grad = p.grad.detach()
    return grad.to_dense() if grad.is_sparse else grad


def _used_by_chance(module: nn.Module, step: TrainingStep, probe: Probe, before: dict[Key, Any]) -> frozenset[str]:
    """Parameters reached under really random draws: a layer that is dropped at random is not unused."""
    used: set[str] = set()
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    for _ in range(2):
        for p in parameters.values():
            p.grad = None
        with described_failures(step):
            step.loss(module, probe.batch).backward()
        used |= {name for name, p in parameters.items() if p.grad is not None}
        put_back(module, before)
    return frozenset(used)


def _name(key: Key) -> str:
    return ".".join(part for part in key if part)


def _scratch(
    module: nn.Module, step: TrainingStep, probe: Probe, before: dict[Key, Any], first: Run, written: list[Key]
) -> tuple[Key, ...]:
    """Attributes that hold nothing of an earlier step: after another sample, the step ends as it does from the start."""
    modules = dict(module.named_modules())
    attributes = [
        (path, name)
        for path, name in written
        if name not in modules[path]._buffers and name not in modules[path]._parameters
    ]
    if not attributes:
        return ()
    try:
        run_step(module, step, probe.singles[-1], before)
        again = run_step(module, step, probe.singles[0], before)
    except TrainingStepError:
        return ()  # what the first step left behind breaks the second
    finally:
        put_back(module, before)
    if any(not torch.allclose(g, first.gradients[n], rtol=1e-3, atol=1e-6) for n, g in again.gradients.items()):
        return ()
    return tuple(key for key in attributes if key in again.written and same(again.written[key], first.written.get(key)))


def _writes(runs: list[Run]) -> tuple[list[Key], list[Key]]:
    keys = dict.fromkeys(key for run in runs for key in run.written)
    constant, dependent = [], []
    for key in keys:
        values = [run.written.get(key) for run in runs if key in run.written]
        everywhere = len(values) == len(runs) and all(same(values[0], v) for v in values)
        counter = all(isinstance(v, (bool, int, str)) for v in values)
        (constant if everywhere or counter else dependent).append(key)
    return constant, dependent


def _module_calls(recording: StepLog) -> tuple[ModuleCall, ...]:
    count: dict[str, int] = {}
    out = []
    for number, call in enumerate(recording.order):
        earlier = count.get(call.path, 0)
        reached = number in recording.reached
        times = (call.site, call.carries_graph, call.entered, call.left)
        out.append(ModuleCall(call.path, earlier, call.shapes, reached, *times))
        count[call.path] = earlier + 1
    return tuple(out)


def _several(module: nn.Module, recording: StepLog) -> tuple[str, ...]:
    names: dict[int, list[str]] = {}
    for name, p in module.named_parameters(remove_duplicate=False):
        if p.requires_grad:
            names.setdefault(id(p), []).append(name)
    return tuple(
        found[0]
        for found in names.values()
        if len(found) > 1 or any(len(recording.calls.get(name.rpartition(".")[0], ())) > 1 for name in found)
    )

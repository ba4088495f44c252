"""Running the training step on the probe and writing down what really happens.

The step is run once on every sample alone and once on all of them together, on the plain (repaired) model. The
singles are at the same time the batch-of-one reference that the audit compares every engine with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dpfix import sampling, trees
from dpfix.errors import DPFixError, ModelError, TrainingStepError
from dpfix.layout import CallLayout, layout_of_calls
from dpfix.probe import Probe
from dpfix.traceless import FixedRandomness, Key, put_back, same, state_of, traceless, written
from dpfix.training_step import TrainingStep

Gradients = dict[str, torch.Tensor]


@dataclass(frozen=True)
class RootCall:
    """One call of the model's ``forward`` during a step.

    Attributes:
        args: positional arguments, tensors detached.
        kwargs: keyword arguments, tensors detached.
        output: what it returned, tensors detached.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


@dataclass(frozen=True)
class Run:
    """One training step on the plain model.

    Attributes:
        loss: value of the loss.
        gradients: gradient of every trainable parameter, by name; zeros where none arrived.
        used: names of the parameters that a gradient reached.
        calls: the calls of the model's ``forward``.
        written: state that the step changed, with its new value.
        random_modules: paths of modules inside which something random was drawn.
        low_precision: whether half precision was used.
    """

    loss: float
    gradients: Gradients
    used: frozenset[str]
    calls: tuple[RootCall, ...]
    written: dict[Key, Any]
    random_modules: frozenset[str]
    low_precision: bool


@dataclass(frozen=True)
class StepRecord:
    """What one training step on the probe does.

    Attributes:
        together: the step on all samples.
        alone: the step on every sample alone: the batch-of-one reference.
        calls: how each call of ``forward`` lays out its samples.
        layout_problem: why the layout could not be told, or empty.
        unused: trainable parameters that no gradient reached in any run.
        constant_writes: state changed by the step in a way that depends on no sample.
        sample_writes: state changed by the step in a way that depends on the samples.
    """

    together: Run
    alone: tuple[Run, ...]
    calls: tuple[CallLayout, ...]
    layout_problem: str
    unused: tuple[str, ...]
    constant_writes: tuple[str, ...]
    sample_writes: tuple[str, ...] = field(default=())

    @property
    def random_modules(self) -> frozenset[str]:
        """Paths of modules inside which something random was drawn."""
        return frozenset().union(self.together.random_modules, *(run.random_modules for run in self.alone))

    @property
    def low_precision(self) -> bool:
        """Whether half precision was used anywhere."""
        return self.together.low_precision


def observe(module: nn.Module, step: TrainingStep, probe: Probe) -> StepRecord:
    """Run the step on every sample alone and on all together.

    Args:
        module: the repaired model, in training mode.
        step: from batch to loss.
        probe: the samples.

    Returns:
        What was seen. The model, every generator and every gradient are afterwards as before.
    """
    with traceless(module) as before:
        alone = []
        for batch in probe.singles:
            alone.append(run_step(module, step, batch, before))
            put_back(module, before)
        together = run_step(module, step, probe.batch, before)
        put_back(module, before)
        used = together.used.union(*(run.used for run in alone))
        if together.random_modules:
            used |= _used_by_chance(module, step, probe, before)
    calls, problem = layout_of_calls(together.calls, [run.calls for run in alone])
    trainable = [name for name, p in module.named_parameters() if p.requires_grad]
    constant, dependent = _writes([*alone, together])
    unused = tuple(name for name in trainable if name not in used)
    return StepRecord(together, tuple(alone), calls, problem, unused, constant, dependent)


def run_step(module: nn.Module, step: TrainingStep, batch: Any, before: dict[Key, Any]) -> Run:
    """One forward and backward pass on the plain model with fixed randomness.

    Args:
        module: the model.
        step: from batch to loss.
        batch: a collated batch.
        before: snapshot of the model's state, to tell what was written.

    Returns:
        What happened.
    """
    stack: list[str] = []
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    for p in parameters.values():
        p.grad = None
    calls: list[RootCall] = []
    with recorded_calls(module, calls), tracked_modules(module, stack), FixedRandomness(stack) as mode:
        with described_failures(step):
            loss = step.loss(module, batch)
            loss.backward()
    gradients = {n: _dense(p) for n, p in parameters.items()}
    used = frozenset(n for n, p in parameters.items() if p.grad is not None)
    for p in parameters.values():
        p.grad = None
    return Run(
        float(loss.detach()),
        gradients,
        used,
        tuple(calls),
        written(module, before),
        frozenset().union(*mode.random_ops.values()) if mode.random_ops else frozenset(),
        mode.low_precision,
    )


def stand_in(module: nn.Module, step: TrainingStep, probe: Probe, record: StepRecord) -> Any:
    """What an empty draw delivers: one sample without data on which the training step runs.

    A sample of zeros if the step gives a finite loss for it, else a probe sample (redrawn values). Whatever it holds,
    the step that follows an empty draw is made of noise alone.

    Args:
        module: the repaired model.
        step: from batch to loss.
        probe: the samples.
        record: what the probe showed.

    Returns:
        A batch of one sample.
    """
    blank = sampling.stand_in(probe.singles[0])
    with traceless(module) as before:
        try:
            if math.isfinite(run_step(module, step, blank, before).loss):
                return blank
        except DPFixError:
            pass  # zeros are no legal sample for this step; a probe sample is
    finite = [b for b, run in zip(probe.singles, record.alone, strict=True) if math.isfinite(run.loss)]
    return (finite or [*probe.singles])[0]


def _dense(p: nn.Parameter) -> torch.Tensor:
    if p.grad is None:
        return torch.zeros_like(p, memory_format=torch.contiguous_format)
    grad = p.grad.detach()
    return (grad.to_dense() if grad.is_sparse else grad).clone()


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


def _writes(runs: list[Run]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    keys = dict.fromkeys(key for run in runs for key in run.written)
    constant, dependent = [], []
    for key in keys:
        values = [run.written.get(key) for run in runs if key in run.written]
        everywhere = len(values) == len(runs) and all(same(values[0], v) for v in values)
        counter = all(isinstance(v, (bool, int, str)) for v in values)
        (constant if everywhere or counter else dependent).append(".".join(part for part in key if part))
    return tuple(constant), tuple(dependent)


@contextmanager
def recorded_calls(module: nn.Module, calls: list[RootCall]) -> Iterator[None]:
    """Write down every call of a module's ``forward``.

    Args:
        module: the module.
        calls: where the calls are appended.

    Yields:
        Nothing.
    """

    def detach(_: trees.Path, leaf: Any) -> Any:
        return leaf.detach().as_subclass(torch.Tensor) if isinstance(leaf, torch.Tensor) else leaf

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.append(RootCall(*(trees.map_leaves(detach, part) for part in (args, kwargs, output))))

    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def tracked_modules(module: nn.Module, stack: list[str]) -> Iterator[None]:
    """Keep the paths of the modules that are being called.

    Args:
        module: the model.
        stack: the list to keep them in.

    Yields:
        Nothing.
    """

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if stack:
            stack.pop()

    handles = []
    for path, child in module.named_modules():
        handles.append(child.register_forward_pre_hook(lambda m, a, path=path: stack.append(path), prepend=True))
        handles.append(child.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def described_failures(step: TrainingStep) -> Iterator[None]:
    """Turn an error of the user's step into one that says what was being tried.

    Args:
        step: the training step.

    Yields:
        Nothing.

    Raises:
        TrainingStepError: the step raised something that is no refusal of dpfix.
    """
    try:
        yield
    except DPFixError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError, NotImplementedError) as error:
        place = _last_place(error)
        raise TrainingStepError(
            f"the training step ({step.origin}) fails on a probe of a few samples, or on a single one: "
            f"{type(error).__name__}: {error} ({place}). Check training_step= and criterion=, and that the "
            "model runs on one batch and on a single sample before it is made private."
        ) from error


def _last_place(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace is not None else "place unknown"


def materialise(module: nn.Module, step: TrainingStep, probe: Probe) -> bool:
    """Let lazy modules create their parameters, by one forward pass of the training step.

    The initialisers draw from the script's generators as its own first forward pass would have.

    Args:
        module: the model.
        step: from batch to loss.
        probe: the samples.

    Returns:
        Whether there was anything to create.

    Raises:
        ModelError: a parameter is still without shape.
    """
    if not _lazy(module):
        return False
    with described_failures(step), torch.enable_grad():
        step.run(module, probe.batch)
    left = _lazy(module)
    if left:
        raise ModelError(
            f"module: lazy parameter `{left[0]}` of {type(module).__name__} was not created by one training step. "
            "Run one forward pass that uses it before make_private_safe, or remove the layer."
        )
    return True


def _lazy(module: nn.Module) -> list[str]:
    return [n for n, p in module.named_parameters() if isinstance(p, nn.parameter.UninitializedParameter)]

"""What a real call of the model tells about the training step.

The first real call is taken apart. What it was given of the delivered batch is given of the probe's batch from then on; a
tensor with a row per sample that the loop has made itself (noise, time steps) is split into rows; all else stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from dpfix.errors import TrainingStepError
from dpfix.instrument import pytree
from dpfix.instrument.fixed_randomness import FixedRandomness
from dpfix.instrument.gradients import unchanged
from dpfix.instrument.module_state import traceless
from dpfix.observe.call_rows import RowDims, dims_in_batch, from_rows, made_of_sizes, place
from dpfix.observe.call_sources import Call, Source, Sources
from dpfix.observe.joined import ROOT, joined
from dpfix.observe.one_step import run_step
from dpfix.observe.probe import Probe
from dpfix.observe.training_step import Subject, TrainingStep, surrogate_loss


@dataclass(frozen=True)
class Way:
    """One reading of a real call.

    Attributes:
        step: the training step that makes such a call.
        samples: the probe that it runs on.
        fixed: tensors that stay as they were, and may have been computed from samples, by their place in the call.
    """

    step: TrainingStep
    samples: Probe
    fixed: Mapping[pytree.Path, torch.Tensor] = field(default_factory=dict)


def learn(module: nn.Module, call: Call, usual: Probe, loss_reduction: str) -> tuple[Way, ...]:
    """Learn the training step from a real call.

    Args:
        usual: samples of the loader's dataset.

    Returns:
        Its readings, the likelier first: whether a number is that of the samples in the batch, or a tensor made of sizes has a
        row for each, shows when it is tried. None if the call was made after an empty draw and does not tell.

    Raises:
        TrainingStepError: it cannot be told which rows of the arguments belong to which sample.
    """
    n, sources = call.samples, Sources(call)
    source = sources.of(call.arguments)
    sized = {path for path, t in call.tensors if made_of_sizes(t)}
    own_rows = {path for path, t in sources.others.items() if n in t.shape}
    readings: list[tuple[Source, Probe, Mapping[pytree.Path, torch.Tensor]]] = []
    if sources.found and own_rows <= sized:
        probe, given = joined(usual), partial(_under_root, source)
        readings.append((source, usual, sources.others) if probe is None else (given, probe, sources.others))
    if own_rows or not readings:
        if call.drawn == 0:
            return ()
        rows = RowDims(call, sources, dims_in_batch(usual)).readings(module, sized)
        readings = [*(from_rows(call, dims) for dims in rows), *readings]
    counts = any(_is_number(leaf, n) for _, leaf in pytree.leaves(call.arguments))
    known = _returns_loss(module, call)
    ways = []
    for plain, samples, fixed in readings:
        unsure = {p: t for p, t in fixed.items() if p not in sized and not _is_number(t, n)}
        ways.append(Way(_step(plain, loss_reduction, known), samples, unsure))
        if counts:
            ways.append(Way(_step(partial(_counted, plain, n), loss_reduction, known), samples, unsure))
    return tuple(ways)


def together(ways: Sequence[Way]) -> Way:
    """Several calls as one training step, whose samples are those of each."""
    if len(ways) == 1:
        return ways[0]

    def collate(items: list[Any]) -> Any:
        return {k: way.samples.collate([item[k] for item in items]) for k, way in enumerate(ways)}

    def run(model: nn.Module, batch: Any) -> torch.Tensor:
        losses = [way.step.run(model, batch[k]) for k, way in enumerate(ways)]
        return sum(losses[1:], losses[0])

    size = min(len(way.samples) for way in ways)
    items = tuple({k: way.samples.items[i] for k, way in enumerate(ways)} for i in range(size))
    known = all(way.step.loss_known for way in ways)
    step = TrainingStep(run, f"{len(ways)} calls of the model: {ways[-1].step.origin}", known, guessed=True)
    samples = Probe(collate(list(items)), tuple(collate([item]) for item in items), collate, items)
    return Way(step, samples, {})


def _under_root(source: Source, batch: Any) -> Any:
    return source(batch[ROOT])


def check_fixed(module: nn.Module, way: Way) -> None:
    """What a sample's gradient depends on must come from the sample, or from no sample at all.

    Raises:
        TrainingStepError: it depends on a tensor that the loop has made, perhaps from the batch.
    """
    if not way.fixed:
        return
    subject, batch = Subject(module, way.step), way.samples.singles[0]
    with traceless(module) as before:
        plain = run_step(subject, batch, before).gradients
        for path, tensor in way.fixed.items():
            values = tensor.clone()
            tensor.copy_(~values if values.dtype is torch.bool else values * 2 + 1)
            try:
                changed = run_step(subject, batch, before).gradients
                same = unchanged(changed, plain)
            except TrainingStepError:
                same = False  # values that it cannot take
            finally:
                tensor.copy_(values)
            if not same:
                raise TrainingStepError(
                    f"{type(module).__name__} was called with {place(path)} {tuple(tensor.shape)}, which is no part of the batch "
                    "and carries no sample, and the gradient depends on it.",
                    "If the loop computes it from the batch (the number of its tokens, a mean), one sample's share of the loss "
                    "depends on the others, and clipping per sample bounds nothing. No parameter has moved.",
                    "Pass it as a Python number or keep it on the model if it depends on no sample; otherwise pass "
                    "training_step=lambda model, batch: <the loss your loop computes> to make_private_safe.",
                    path="training_step",
                )


def _is_number(leaf: Any, n: int) -> bool:
    if isinstance(leaf, torch.Tensor):
        return leaf.dim() == 0 and not leaf.is_complex() and not leaf.requires_grad and bool(leaf == n)
    return type(leaf) in {int, float} and leaf == n


def _counted(source: Source, n: int, batch: Any) -> Any:
    """The arguments with the number of samples in the batch wherever the real call had that of its own."""
    samples = next((len(t) for t in pytree.tensors(batch) if t.dim()), 1)

    def counted(path: pytree.Path, leaf: Any) -> Any:
        if not _is_number(leaf, n):
            return leaf
        return torch.full_like(leaf, samples) if isinstance(leaf, torch.Tensor) else type(leaf)(samples)

    return pytree.map_leaves(counted, source(batch))


def _step(source: Source, loss_reduction: str, loss_known: bool) -> TrainingStep:
    def run(model: nn.Module, batch: Any) -> torch.Tensor:
        args, kwargs = source(batch)
        output = model(*args, **kwargs)
        losses = _losses(output)
        return sum(losses[1:], losses[0]) if losses else surrogate_loss(output, loss_reduction)

    loss = "the loss it returns" if loss_known else "a stand-in loss"
    return TrainingStep(run, f"the loop's own call of the model, and {loss}", loss_known, guessed=True)


def _losses(output: Any) -> list[torch.Tensor]:
    """The losses that a model returns: scalars that are called so, or all of its outputs if they are scalars."""
    found = [(p, t) for p, t in pytree.leaves(output) if isinstance(t, torch.Tensor) and t.requires_grad]
    named = [t for p, t in found if t.dim() == 0 and p and "loss" in str(p[-1])]
    return named or ([t for _, t in found] if all(t.dim() == 0 for _, t in found) else [])


def _returns_loss(module: nn.Module, call: Call) -> bool:
    args, kwargs = pytree.map_leaves(
        lambda _, leaf: leaf.detach() if isinstance(leaf, torch.Tensor) else leaf, call.arguments
    )
    with traceless(module), FixedRandomness():
        return bool(_losses(module(*args, **kwargs)))

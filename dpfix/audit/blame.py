"""Where samples are mixed first: before the model, in one of its modules, or in a hook of the user."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dpfix.audit.reference import Trial
from dpfix.instrument import pytree
from dpfix.instrument.double_precision import DoublePrecision
from dpfix.instrument.fixed_randomness import Draw, FixedRandomness
from dpfix.instrument.module_state import traceless
from dpfix.instrument.own_generators import drawing
from dpfix.instrument.source import describe_module, line_of_code
from dpfix.layout.infer import sample_dim
from dpfix.layout.rows import Rows
from dpfix.observe.training_step import Subject
from dpfix.report.finding import Finding

Tensors = list[torch.Tensor]


@dataclass
class Call:
    """One call of a module.

    Attributes:
        path: path of the module.
        given: tensors that it was called with.
        entered: those that its ``forward`` got, after the hooks of the user.
        made: those that ``forward`` returned.
        left: those that its caller got, after the hooks of the user.
    """

    path: str
    given: Tensors = field(default_factory=list)
    entered: Tensors = field(default_factory=list)
    made: Tensors = field(default_factory=list)
    left: Tensors = field(default_factory=list)


def differs(whole: torch.Tensor, parts: Tensors, tolerance: float, counts: tuple[int, ...]) -> str:
    """Why a tensor of the batch is not made of those of single samples.

    Returns:
        The reason; empty if it is, or if it cannot be told.
    """
    if not whole.is_floating_point():
        return ""
    dim, problem = sample_dim(whole, parts, counts)
    if problem or dim is None:
        return ""
    rows = Rows.of(dim, len(parts))
    for i, part in enumerate(parts):
        taken = rows.take(whole, i)
        if taken.shape != part.shape or not part.numel():
            return ""
        scale = max(float(part.abs().max()), 1e-6)
        error = float((taken - part).abs().max()) / scale
        if not error <= tolerance and torch.isfinite(part).all():
            return f"the output for one sample alone differs by {error:.1e} (relative) from the one in a batch"
    return ""


def _mixed(whole: Tensors, singles: Sequence[Tensors], tolerance: float, counts: tuple[int, ...]) -> bool:
    lists = [[one[k] for one in singles if k < len(one)] for k in range(len(whole))]
    pairs = zip(whole, lists, strict=True)
    return any(len(parts) == len(singles) and bool(differs(t, parts, tolerance, counts)) for t, parts in pairs)


def mixing(subject: Subject, trial: Trial, coupled: str, tolerance: float) -> Finding:
    """Where the samples are mixed first.

    Args:
        coupled: how the model's output shows it, in words.
        tolerance: relative difference that is rounding.

    Returns:
        The refusal.
    """
    samples, counts, module = trial.samples, trial.record.counts, subject.module
    whole, *singles = [_calls(subject, batch, trial.draw) for batch in (samples.batch, *samples.singles)]
    order = [call.path for call in whole]
    if any([call.path for call in single] != order for single in singles):
        return _by_module(module, "", coupled)

    def mixed(calls: Callable[[Call], Tensors], number: int) -> bool:
        return _mixed(calls(whole[number]), [calls(single[number]) for single in singles], tolerance, counts)

    roots = [number for number, call in enumerate(whole) if not call.path]
    if any(mixed(lambda call: call.given, number) for number in roots):
        batch, ones = pytree.tensors(samples.batch), [pytree.tensors(one) for one in samples.singles]
        return _before_the_model(trial, coupled, by_collate=_mixed(batch, ones, tolerance, counts))
    for number, call in enumerate(whole):
        if not mixed(lambda call: call.left, number) or mixed(lambda call: call.given, number):
            continue
        if mixed(lambda call: call.entered, number):
            return _by_hook(module, call.path, module.get_submodule(call.path)._forward_pre_hooks, coupled)
        if not mixed(lambda call: call.made, number):
            return _by_hook(module, call.path, module.get_submodule(call.path)._forward_hooks, coupled)
        return _by_module(module, call.path, coupled, padded=_padded(whole[roots[0]], singles, roots[0]))
    padded = bool(roots) and _padded(whole[roots[0]], singles, roots[0])
    return _by_module(module, "", coupled, padded=padded)


def _padded(root: Call, singles: Sequence[Sequence[Call]], number: int) -> bool:
    """Whether the model's inputs are longer in the batch than for one of the samples alone."""
    return any(
        whole.dim() == one.dim() and whole.dim() > 1 and whole.shape[1:] != one.shape[1:]
        for single in singles
        for whole, one in zip(root.given, single[number].given, strict=False)
    )


def _by_module(module: nn.Module, path: str, coupled: str, *, padded: bool = False) -> Finding:
    why = "sample i's output depends on sample j, so clipping per sample bounds nothing."
    help = (
        "replace what is computed over the batch (a mean, a normalisation, an attention over dimension 0) by something per "
        "sample. training_step was run on the whole probe batch and on single samples."
    )
    if padded:
        why = (
            "collate_fn pads every sample to the longest one of its batch, and the model lets the padding in: sample i's output "
            "depends on the length of sample j."
        )
        help = "give the model a mask or the lengths and leave the padding out, or pad all samples to one fixed length."
    return Finding.refusal(
        "DPF013",
        f"{describe_module(module, path)} mixes the samples of a batch: {coupled}.",
        why,
        help,
        path=path,
    )


def _by_hook(module: nn.Module, path: str, hooks: Any, coupled: str) -> Finding:
    hook = next(iter(hooks.values()), None)
    return Finding.refusal(
        "DPF042",
        f"a hook on {describe_module(module, path)} mixes the samples of a batch ({line_of_code(hook)}): {coupled}.",
        "what forward gets or returns is right; the hook makes sample i's output depend on sample j, so clipping per sample "
        "bounds nothing.",
        "remove the hook, or let it work on every sample by itself.",
        path=path,
    )


def _before_the_model(trial: Trial, coupled: str, *, by_collate: bool) -> Finding:
    where = "collate_fn" if by_collate else "training_step"
    what = "what collate_fn makes of a sample" if by_collate else "what training_step gives to the model for a sample"
    return Finding.refusal(
        "DPF041",
        f"{where} mixes the samples of a batch before the model is called: {what} depends on the other samples; {coupled}.",
        "a normalisation over the batch, mixup, neighbours in the batch: sample i's gradient depends on sample j, so clipping "
        "per sample bounds nothing. The modules of the model get samples that are mixed already.",
        "compute it for every sample by itself, with statistics that are fixed before training, in the dataset for example.",
        path="data_loader" if by_collate else "training_step",
    )


def _calls(subject: Subject, batch: Any, draw: Draw) -> list[Call]:
    """All module calls of one forward pass, in the order in which they returned."""
    seen: list[Call] = []
    double = any(p.dtype is torch.float64 for p in subject.module.parameters())
    precision = DoublePrecision() if double else nullcontext()
    with (
        traceless(subject.module),
        _watched(subject.module, seen),
        FixedRandomness(draw=draw),
        precision,
        drawing(subject.generators, draw),
    ):
        subject.step.run(subject.module, batch)
    return seen


@contextmanager
def _watched(module: nn.Module, seen: list[Call]) -> Iterator[None]:
    running: list[Call] = []

    def given(path: str) -> Any:
        def note(m: nn.Module, args: Any, kwargs: Any) -> None:
            running.append(Call(path, _copies((args, kwargs))))

        return note

    def entered(m: nn.Module, args: Any, kwargs: Any) -> None:
        running[-1].entered = _copies((args, kwargs))

    def made(m: nn.Module, args: Any, output: Any) -> None:
        running[-1].made = _copies(output)

    def left(m: nn.Module, args: Any, output: Any) -> None:
        call = running.pop()
        call.left = _copies(output)
        seen.append(call)

    handles = [
        handle
        for path, m in module.named_modules()
        for handle in (
            m.register_forward_pre_hook(given(path), prepend=True, with_kwargs=True),
            m.register_forward_pre_hook(entered, with_kwargs=True),
            m.register_forward_hook(made, prepend=True),
            m.register_forward_hook(left),
        )
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _copies(tree: Any) -> Tensors:
    return [t.detach().to_dense().as_subclass(torch.Tensor).clone() for t in pytree.tensors(tree)]

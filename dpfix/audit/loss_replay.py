"""The loss on other labels, without the model: its outputs of the ordinary probe are put in its place.

Labels, masks and lengths that no model sees can then be tried by the dozen, in double precision, for what a loss costs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from dpfix.audit.reference import Trial
from dpfix.errors import USER_CODE_ERRORS, DPFixError
from dpfix.instrument import pytree
from dpfix.instrument.double_precision import DoublePrecision
from dpfix.instrument.fixed_randomness import DRAWS, FixedRandomness
from dpfix.instrument.own_generators import drawing
from dpfix.layout.infer import sample_dim
from dpfix.layout.rows import Rows
from dpfix.observe.recorder import RecordedCall
from dpfix.observe.training_step import Subject

Gradients = list[torch.Tensor]
"""Gradients with respect to the floating outputs of the model's calls, in order."""


class OtherCallError(Exception):
    """The model is called with other arguments than those that were recorded."""


class _SameCallError(Exception):
    """The model is called with the arguments that were recorded; raised to go no further."""


@dataclass(frozen=True)
class Replay:
    """The loss of the training step as a function of the batch, with the model's outputs as they were recorded.

    Attributes:
        subject: the model and the step.
        together: the calls of the model on the probe.
        alone: the calls on every sample alone, with the outputs that it has in the batch.
        rows: where the samples are in every floating output; ``None`` where it carries none.
        double: whether the loss is computed in double precision.
    """

    subject: Subject
    together: tuple[RecordedCall, ...]
    alone: tuple[tuple[RecordedCall, ...], ...]
    rows: tuple[Rows | None, ...]
    double: bool = True

    def sees(self, batch: Any, calls: Sequence[RecordedCall]) -> bool:
        """Whether the model's first call with a batch has other arguments than the recorded one."""
        try:
            with _standing_in(self.subject.module, calls[:1], stop=True), FixedRandomness(), torch.no_grad():
                self.subject.step.run(self.subject.module, batch)
        except _SameCallError:
            return False
        except (OtherCallError, DPFixError, *USER_CODE_ERRORS):
            return True
        return True

    def gradients(self, batch: Any, calls: Sequence[RecordedCall]) -> Gradients:
        """Gradients of the loss of a batch with respect to the outputs; zeros where none arrives.

        Returns:
            One tensor per floating output.

        Raises:
            OtherCallError: the model is called in another way.
        """
        with ExitStack() as stack:
            leaves = stack.enter_context(_standing_in(self.subject.module, calls))
            stack.enter_context(FixedRandomness())
            stack.enter_context(drawing(self.subject.generators, DRAWS[0]))
            if self.double:
                stack.enter_context(DoublePrecision())
            loss = self.subject.step.run(self.subject.module, batch)
            if len(leaves) != len(self.rows):
                raise OtherCallError
            if not isinstance(loss, torch.Tensor) or not loss.requires_grad:
                return [torch.zeros_like(leaf) for leaf in leaves]
            found = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
        return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]

    def part(self, gradients: Gradients, sample: int) -> Gradients:
        """What belongs to one sample of the gradients of a batch."""
        pairs = zip(gradients, self.rows, strict=True)
        return [g.new_zeros(()) if rows is None else rows.take(g, sample) for g, rows in pairs]


def replay_of(subject: Subject, trial: Trial) -> Replay | None:
    """The loss of a training step on the outputs of a probe, if it can be told where the samples are in them.

    Returns:
        The replay; ``None`` where the outputs cannot be put in the model's place.
    """
    module, record = subject.module, trial.record
    together, alone = record.together.calls[""], [run.calls[""] for run in record.alone]
    hooked = module._forward_hooks or module._forward_pre_hooks or record.low_precision
    if hooked or not together or any(len(calls) != len(together) for calls in alone):
        return None
    rows: list[Rows | None] = []
    cut: list[list[RecordedCall]] = [[] for _ in alone]
    for number, call in enumerate(together):
        outputs, ones = _floating(call.output), [_floating(calls[number].output) for calls in alone]
        if any(len(one) != len(outputs) for one in ones):
            return None
        places: list[Rows | None] = []
        for k, whole in enumerate(outputs):
            dim, problem = sample_dim(whole, [one[k] for one in ones], record.counts)
            if problem:
                return None
            places.append(None if dim is None else Rows.of(dim, len(alone)))
        for i, calls in enumerate(alone):
            own = _with_rows(calls[number], outputs, places, i)
            if own is None:
                return None
            cut[i].append(own)
        rows += places
    return Replay(subject, tuple(together), tuple(map(tuple, cut)), tuple(rows))


def _with_rows(
    call: RecordedCall, outputs: list[torch.Tensor], places: list[Rows | None], sample: int
) -> RecordedCall | None:
    """A call of one sample with the outputs that it has in the batch; ``None`` if it has another number of them there."""
    values = iter(zip(outputs, places, strict=True))
    fits = True

    def of_sample(_: pytree.Path, leaf: Any) -> Any:
        nonlocal fits
        if not _is_floating(leaf):
            return leaf
        whole, rows = next(values)
        taken = whole if rows is None else rows.take(whole, sample)
        if taken.shape == leaf.shape:
            return taken.detach()
        for dim, size in enumerate(leaf.shape):  # padded to the longest sample of the batch: this one's are the first
            fits = fits and size <= taken.shape[dim]
            taken = taken.narrow(dim, 0, size) if fits else leaf
        return taken.detach()

    own = replace(call, output=pytree.map_leaves(of_sample, call.output))
    return own if fits else None


def _is_floating(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()


def _floating(tree: Any) -> list[torch.Tensor]:
    return [leaf for _, leaf in pytree.leaves(tree) if _is_floating(leaf)]


@contextmanager
def _standing_in(
    module: nn.Module, calls: Sequence[RecordedCall], *, stop: bool = False
) -> Iterator[list[torch.Tensor]]:
    """Every call of a model gives the recorded output.

    Args:
        stop: stop at the first call.

    Yields:
        The floating outputs, once they have been given: leaves of a graph.
    """
    leaves: list[torch.Tensor] = []
    coming = iter(calls)

    def forward(*args: Any, **kwargs: Any) -> Any:
        call = next(coming, None)
        if call is None or not _alike((call.args, call.kwargs), (args, kwargs)):
            raise OtherCallError
        if stop:
            raise _SameCallError

        def leaf_of(_: pytree.Path, value: Any) -> Any:
            if not _is_floating(value):
                return value
            dtype = torch.promote_types(value.dtype, torch.get_default_dtype())
            leaves.append(value.detach().to(dtype, copy=True).requires_grad_())
            return leaves[-1]

        return pytree.map_leaves(leaf_of, call.output)

    own = vars(module).get("forward")
    vars(module)["forward"] = forward
    try:
        yield leaves
    finally:
        if own is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = own


def _alike(recorded: Any, given: Any) -> bool:
    """Whether two trees of arguments are equal up to rounding."""
    pairs = [pytree.leaves(recorded), pytree.leaves(given)]
    if [path for path, _ in pairs[0]] != [path for path, _ in pairs[1]]:
        return False
    return all(_equal(a, b) for (_, a), (_, b) in zip(*pairs, strict=True))


def _equal(a: Any, b: Any) -> bool:
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
        return type(a) is type(b) and (not isinstance(a, (bool, int, float, str)) or a == b)
    if a.shape != b.shape or a.layout is not torch.strided or b.layout is not torch.strided:
        return False
    if a.is_floating_point() or a.is_complex():
        b = b.detach().to(a.dtype)
        return torch.allclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True)
    return torch.equal(a, b)

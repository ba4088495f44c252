"""A step for which the memory did not suffice is left out, and its logical batch begun again in smaller parts.

That is so where the size of physical batches was found and not told (``max_physical_batch_size="auto"``).
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from typing_extensions import override

from dpfix.engines.per_sample.microbatch import join_outputs, samples_of_call
from dpfix.instrument import pytree
from dpfix.instrument.source import warn_user
from dpfix.layout.calls import known_layout, samples_in
from dpfix.sampling.draw import Draw
from dpfix.training.guards.check import Check, Guarded
from dpfix.training.out_of_memory import free, is_lack_of_memory

_MARK = "dpfix: made by a training"


class BegunAgain(Check):
    """With ``max_physical_batch_size="auto"``, a logical batch is delivered again from its start where memory ran out.

    It is the same draw, released and accounted once; nothing of the parts that were given up is in what is released.

    Catches: a lack of memory in the model's call, in ``backward()`` and in the step. Costs: two comparisons.

    Attributes:
        failed: the part of a draw for which the memory did not suffice.
    """

    def __init__(self, guarded: Guarded) -> None:
        self._guarded = guarded
        self.needed = guarded.plan.halves and guarded.ledger is not None
        self.failed: Draw | None = None
        if self.needed:
            watch_backward()

    def can_give_up(self) -> bool:
        """Whether the batch that the loop works on can be delivered in smaller parts."""
        ledger = self._guarded.ledger
        draw = None if not self.needed or ledger is None else ledger.present()
        return draw is not None and draw.part_of is not None and (draw.samples > 1 or draw.given_up)

    def give_up(self) -> None:
        """Memory ran out for the batch that the loop works on; its step is left out."""
        assert self._guarded.ledger is not None
        self.failed = self._guarded.ledger.present()
        self._guarded.handle.clear()

    @contextmanager
    def giving_up(self) -> Iterator[None]:
        """A lack of memory in here ends the block, and the batch is given up, if it can be; then :attr:`due` says so."""
        try:
            yield
        except RuntimeError as error:
            if not is_lack_of_memory(error) or not self.can_give_up():
                raise
            self.give_up()

    def output(self, wrapper: Any, args: Any, kwargs: Any) -> Any:
        """What the model gives back for a batch that was given up, one sample after the other, so that the loop can go on.

        No gradient leads through it to a parameter.

        Args:
            wrapper: computes the model's output.

        Returns:
            The output; leaves that carry gradient do so still.
        """
        free()
        plan, module = self._guarded.plan, self._guarded.module
        args, kwargs = pytree.plain(args), pytree.plain(kwargs)
        layout = known_layout(plan.calls, module, args, kwargs, self._guarded.handle.counts())
        samples = samples_in(layout, module, args, kwargs)
        outputs = []
        for own_args, own_kwargs in samples_of_call(layout, args, kwargs, samples):
            with torch.no_grad():
                output = wrapper(*own_args, **own_kwargs)
            outputs.append(pytree.map_leaves(_leaf, output))
        return join_outputs(layout, outputs, plan.weight(samples, self._guarded.handle.counts()))

    @property
    def due(self) -> bool:
        """Whether the step that is about to be made is to be left out."""
        draw = self._guarded.progress.draw
        return self.failed is not None or (draw is not None and draw.given_up)

    def begin_again(self, summed: Draw | None) -> None:
        """The sum of the draw so far is dropped, and the loader told to deliver the draw again from its start.

        So is a draw that the loop has gone on to without a step for the one that failed: its step is left out too.

        Args:
            summed: the draw of which parts are in the sum; that of another one than failed stays as it is.
        """
        draw, self.failed = self.failed, None
        guarded, ledger = self._guarded, self._guarded.ledger
        left_out = {
            d for d in (draw, guarded.progress.draw) if d is not None and d.part_of is not None and not d.given_up
        }
        if draw is None or ledger is None or not left_out:
            return
        if not guarded.progress.partial or any(summed is d.whole for d in left_out):
            guarded.progress.partial = 0
            guarded.forget_sum()
        for p in guarded.parameters.values():
            p.grad = p.grad_sample = None  # type: ignore[attr-defined]
        ledger.limit_to(max(1, draw.samples // 2))
        again = all([ledger.ask_again(part) for part in left_out if not part.given_up])
        warn_user(
            f"memory ran out with {draw.samples} samples at a time: "
            + (
                f"the batch is delivered again from its start, in parts of at most {ledger.limit}, and so are those that follow. "
                "It is released and accounted once."
                if again
                else "the loop has taken it as the last one of its pass, so that it cannot be delivered again. It is accounted "
                f"and not released. From now on, parts have at most {ledger.limit} samples."
            )
        )

    @override
    def take_over(self, earlier: BegunAgain) -> None:
        self.failed = earlier.failed


def _leaf(path: pytree.Path, leaf: Any) -> Any:
    floating = isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
    return leaf.detach().requires_grad_() if floating else leaf


def mark(output: Any, training: BegunAgain) -> None:
    """Write down in the graph which training's model has made the output of a call.

    Args:
        output: any nested containers.
        training: is held weakly.
    """
    for t in pytree.gradient_tensors(output):
        if t.grad_fn is not None:
            _notes(t.grad_fn)[_MARK] = weakref.ref(training)


def _notes(node: Any) -> dict[str, Any]:
    """A dictionary of a node of the graph, in which anybody may write."""
    return node.metadata


def _trainings(loss: torch.Tensor) -> list[BegunAgain]:
    """Those whose models a graph leads to."""
    found, known = dict[int, BegunAgain](), set[Any]()
    left: list[Any] = [loss.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in known:
            continue
        known.add(node)
        training = _notes(node).get(_MARK, lambda: None)()
        if training is not None:
            found[id(training)] = training
        left += [following for following, _ in node.next_functions]
    return list(found.values())


def watch_backward() -> None:
    """A lack of memory in ``loss.backward()`` makes the trainings that the loss is of give up the batch that they work on.

    The line is the script's: without the wrapper that is put around ``torch.Tensor.backward``, once, nobody could go on after it.
    Any other error passes through, and a lack of memory where a training cannot give up its batch.
    """
    original = torch.Tensor.backward
    if getattr(original, "watched_by_dpfix", False):
        return

    @functools.wraps(original)
    def backward(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, *args, **kwargs)
        except RuntimeError as error:
            trainings = _trainings(self) if is_lack_of_memory(error) else []
            if not trainings or not all(training.can_give_up() for training in trainings):
                raise
        for training in trainings:
            training.give_up()
        free()
        return None

    backward.watched_by_dpfix = True  # type: ignore[attr-defined]
    torch.Tensor.backward = backward

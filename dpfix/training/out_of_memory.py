"""What happens to a step for which the memory did not suffice.

Where the size of physical batches was found and not told (``max_physical_batch_size="auto"``), the loop goes on: the batch is
given up, its step is left out, and the loader delivers the logical batch again from its start, in parts of half the size.
Elsewhere the error comes out of the script's own lines, which only the script can run again: the text says with which size.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any, Protocol

import torch

from dpfix.instrument import pytree
from dpfix.instrument.freed_memory import give_back
from dpfix.sampling.ledger import DrawLedger

_OURS = "dpfix: memory ran out"
_ON_CPU = "DefaultCPUAllocator: can't allocate memory"


_MARK = "dpfix: made by a training"


class GivesUp(Protocol):
    """A training that can give up the batch that it works on."""

    def can_give_up(self) -> bool:
        """Whether it can be delivered in smaller parts."""
        ...

    def give_up(self) -> None:
        """It is left out of what is released."""
        ...


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether this is what torch raises where it cannot have as much memory as it needs."""
    return isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and _ON_CPU in str(error))


def say_size(error: BaseException, ledger: DrawLedger | None) -> None:
    """Add to an error that memory ran out which size of physical batches to take.

    Args:
        error: what was raised.
        ledger: knows the samples that the loop works on; ``None`` where the loader draws by itself.
    """
    samples = None if ledger is None else ledger.pending()
    if not samples or any(_OURS in note for note in getattr(error, "__notes__", ())):
        return
    half = max(1, samples // 2)
    error.add_note(
        f"{_OURS} with {samples} samples at a time; this step was not made. Pass max_physical_batch_size={half} to "
        f"make_private_safe: batches are then delivered in parts of at most {half} samples, and released as wholes."
    )


def free() -> None:
    """Give back what a step that was given up has held; nothing refers to it any more."""
    give_back()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def mark(output: Any, training: GivesUp) -> None:
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


def _trainings(loss: torch.Tensor) -> list[Any]:
    """Those whose models a graph leads to."""
    found, known, left = {}, set(), [loss.grad_fn]
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

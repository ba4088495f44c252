"""All or nothing: what is changed in a private training comes back if anything fails on the way."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dpfix.instrument.rng import GeneratorStates


@contextmanager
def put_back_on_error(
    module: nn.Module, optimizer: Any, others: Sequence[Any], generators: Sequence[torch.Generator]
) -> Iterator[list[Callable[[], None]]]:
    """Inside, a training may be changed; if the body raises, it is as before.

    Args:
        module: the plain model; its weights are copied.
        optimizer: the private optimizer, or ``None``.
        others: objects whose attributes are what they hold (accountant, schedulers).
        generators: of the script, apart from the global ones.

    Yields:
        A list to which the body may add what else has to be undone.
    """
    script, own = GeneratorStates.now(), [(g, g.get_state()) for g in generators]
    weights = [(t, t.clone()) for t in module.state_dict().values() if isinstance(t, torch.Tensor)]
    attributes = [(other, _attributes(other)) for other in others]
    inner: Any = getattr(optimizer, "original_optimizer", optimizer)
    kept = None if optimizer is None else (inner.state, inner.param_groups, _attributes(optimizer))
    undo: list[Callable[[], None]] = []
    done = False
    try:
        yield undo
        done = True
    finally:
        if not done:
            for step in reversed(undo):
                step()
            with torch.no_grad():
                for tensor, before in weights:
                    tensor.copy_(before)
            for other, before in attributes:
                vars(other).clear()
                vars(other).update(before)
            if kept is not None:
                inner.state, inner.param_groups, before = kept
                vars(optimizer).clear()
                vars(optimizer).update(before)
            for generator, state in own:
                generator.set_state(state)
            script.put_back()


def _attributes(thing: Any) -> dict[str, Any]:
    """Attributes by name; plain lists in them are copied, since a history is added to in place."""
    return {name: copy.copy(value) if type(value) is list else value for name, value in vars(thing).items()}

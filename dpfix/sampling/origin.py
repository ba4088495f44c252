"""Which draw a tensor was delivered with, by identity."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from weakref import ref

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils.rnn import PackedSequence

from dpfix.instrument import pytree


class Origins:
    """Tensors and arrays that were delivered, with the owner of each; nothing is kept alive.

    A tensor is known as an object and by its memory, so that its views are known too. The address of an object counts only
    while that very object is alive; the address of memory is not given to another while it is written here. What was
    delivered for two owners (a constant in every batch, slices of one memory) tells nothing. Numbers, strings and Python's
    own containers cannot be known in this way.
    """

    def __init__(self) -> None:
        self._objects: dict[int, tuple[ref[Any], Any]] = {}
        self._memory: dict[int, tuple[StorageWeakRef, Any]] = {}
        self._tidy_at = 64

    def add(self, tree: Any, owner: Any) -> None:
        """A tree was delivered for an owner."""
        for thing in _things(tree):
            key = id(thing)
            known = self._objects.get(key)
            other = known is not None and known[0]() is thing and known[1] is not owner
            self._objects[key] = ref(thing), None if other else owner
            memory = _memory(thing)
            if memory is None:
                continue
            lies = self._memory.get(memory._cdata)
            shared = lies is not None and not lies[0].expired() and lies[1] is not owner
            self._memory[memory._cdata] = StorageWeakRef(memory), None if shared else owner
        if len(self._objects) > self._tidy_at:
            self._objects = {k: entry for k, entry in self._objects.items() if entry[0]() is not None}
            self._memory = {k: entry for k, entry in self._memory.items() if not entry[0].expired()}
            self._tidy_at = 2 * len(self._objects) + 64

    def find(self, tree: Any) -> Any:
        """The owner of the first tensor or array in a tree that has one; ``None`` if none has."""
        for thing in _things(tree):
            known = self._objects.get(id(thing))
            if known is not None and known[1] is not None and known[0]() is thing:
                return known[1]
            memory = _memory(thing)
            lies = None if memory is None else self._memory.get(memory._cdata)
            if lies is not None and lies[1] is not None:
                return lies[1]
        return None

    def alive(self) -> list[Any]:
        """Owners of which something is alive; some of them several times."""
        objects = [owner for reference, owner in tuple(self._objects.values()) if reference() is not None]
        return objects + [owner for reference, owner in tuple(self._memory.values()) if not reference.expired()]


def _things(tree: Any) -> Iterator[Any]:
    """The tensors and arrays in nested containers, and in the attributes of batch objects of other kinds."""
    if isinstance(tree, (torch.Tensor, np.ndarray)):
        yield tree
    elif isinstance(tree, PackedSequence):
        yield tree.data
    else:
        parts = pytree.children(tree)
        if parts is not None:
            for _, part in parts:
                yield from _things(part)
        elif not isinstance(tree, type):
            yield from (value for value in getattr(tree, "__dict__", {}).values() if isinstance(value, torch.Tensor))


def _memory(thing: Any) -> torch.UntypedStorage | None:
    """The memory of a tensor; ``None`` for an array, and for a tensor without one (a sparse one, one under ``torch.vmap``)."""
    if not isinstance(thing, torch.Tensor):
        return None
    try:
        return thing.untyped_storage()
    except RuntimeError:
        return None

"""Where the arguments of a real call of the model come from: the very batch that the loader delivered, or the loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from dpfix.instrument import pytree

Parts = Sequence[tuple[pytree.Path, Any]]
"""A batch and all that it holds, with the keys that lead there."""

Source = Callable[[Any], Any]
"""From a batch to the arguments of the model, or to a part of them."""


@dataclass(frozen=True)
class Call:
    """A real call of the model.

    Attributes:
        args: its positional arguments.
        kwargs: its keyword arguments.
        delivered: the batch that the loader delivered last; empty if none was.
        drawn: how many samples were drawn for it; ``None`` if that is not known.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    delivered: Parts
    drawn: int | None

    @property
    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Both, as one tree."""
        return self.args, self.kwargs

    @property
    def tensors(self) -> list[tuple[pytree.Path, torch.Tensor]]:
        """The tensors among them, by their place in the call."""
        return [(path, t) for path, t in pytree.leaves(self.arguments) if isinstance(t, torch.Tensor)]

    @property
    def samples(self) -> int:
        """How many samples it holds: those drawn (an empty draw delivers one), or as many as its first tensor has rows."""
        return next((len(t) for _, t in self.tensors if t.dim()), 1) if self.drawn is None else max(1, self.drawn)


def takes_from(call: Call) -> bool:
    """Whether anything of the batch is among the arguments."""
    sources = Sources(call)
    sources.of(call.arguments)
    return sources.found


@dataclass
class Sources:
    """Looks for every argument of a call in the delivered batch.

    Attributes:
        places: places in the batch of the tensors that are of it, by their place in the call.
        others: copies of the tensors that are not.
        found: whether anything of the batch is among the arguments.
    """

    call: Call
    places: dict[pytree.Path, pytree.Path] = field(default_factory=dict)
    others: dict[pytree.Path, torch.Tensor] = field(default_factory=dict)
    found: bool = False

    def of(self, node: Any, path: pytree.Path = ()) -> Source:
        """Where a part of the call comes from; what is not of the batch is given as it is."""
        if node is None or isinstance(node, (bool, int, float, str, bytes)):
            return lambda batch: node
        where = self._where(node)
        if where is not None:
            self._note(where, node, path)
            return partial(_taken, where, node)
        if isinstance(node, torch.Tensor):
            kept = self.others[path] = node.detach().clone()
            return lambda batch: kept
        each = self._each(node)
        if each is not None:
            self.found = True
            return each
        parts = pytree.children(node)
        if parts is None:
            return lambda batch: node
        sources = {key: self.of(part, (*path, key)) for key, part in parts}
        return lambda batch: pytree.rebuilt(node, {key: source(batch) for key, source in sources.items()})

    def _note(self, where: pytree.Path, node: Any, path: pytree.Path) -> None:
        self.found = True
        for (below, leaf), (there, _) in zip(pytree.leaves(node, path), pytree.leaves(node, where), strict=True):
            if isinstance(leaf, torch.Tensor):
                self.places[below] = there

    def _where(self, node: Any) -> pytree.Path | None:
        """The place in the batch of the very object, of the same memory, or else of the same values."""
        for path, part in self.call.delivered:
            if part is node:
                return path
        if not isinstance(node, torch.Tensor) or node.layout is not torch.strided:
            return None
        alike = [(path, _tensor(part)) for path, part in self.call.delivered if _has_shape(part, node.shape)]
        for path, t in alike:
            if t.data_ptr() == node.data_ptr() and t.stride() == node.stride():
                return path
        same = [path for path, t in alike if torch.equal(t.to(node), node.detach())]
        return same[0] if len(same) == 1 else None

    def _each(self, node: Any) -> Source | None:
        """A list with one entry per sample, each made in the same way of an entry of a list that the batch holds."""
        if type(node) not in {list, tuple} or len(node) != self.call.samples or len(node) < 2:
            return None
        for path, part in self.call.delivered:
            if type(part) not in {list, tuple} or len(part) != len(node):
                continue
            one = Sources(Call((node[0],), {}, pytree.parts(part[0]), None))
            source = one.of(node[0])
            if one.found and not one.others and all(map(pytree.alike, map(source, part), node)):
                return partial(_of_each, type(node), path, source)
        return None


def _of_each(kind: Any, path: pytree.Path, source: Source, batch: Any) -> Any:
    return kind(source(entry) for entry in pytree.at(batch, path))


def _taken(path: pytree.Path, like: Any, batch: Any) -> Any:
    """The part of a batch at a place, on the same device and of the same type where the argument was a tensor."""
    part = pytree.at(batch, path)
    return _tensor(part).to(device=like.device, dtype=like.dtype) if isinstance(like, torch.Tensor) else part


def _has_shape(part: Any, shape: torch.Size) -> bool:
    if isinstance(part, torch.Tensor):
        return part.shape == shape and part.layout is torch.strided
    return isinstance(part, np.ndarray) and part.shape == tuple(shape)


def _tensor(part: Any) -> torch.Tensor:
    return torch.as_tensor(part) if isinstance(part, np.ndarray) else part

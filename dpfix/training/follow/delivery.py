"""What the loader delivered, and how it carries the samples: learnt from copies of one item, known by identity."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

import numpy as np
import torch

from dpfix.errors import USER_CODE_ERRORS
from dpfix.instrument import pytree
from dpfix.layout.row_count import UnitItems
from dpfix.layout.rows import Rows
from dpfix.layout.sample_dim import SampleDim
from dpfix.observe.probe import Probe

_COPIES = (3, 2)
_DEEP = 8
"""Nested containers that are looked into; an object may refer to itself."""


@dataclass(frozen=True)
class BatchLayout:
    """How the batches of a loader carry their samples.

    Attributes:
        tensors: how every tensor or array does, by its path; one that is not here carries none, or cannot be told.
        lists: paths of lists with one entry per sample.
        of_all: paths of numbers and tensors that are no rows and were seen to depend on which samples there are; it grows.
        by_row: whether a sample is one row here: persons have different numbers of items.
    """

    tensors: Mapping[pytree.Path, SampleDim] = field(default_factory=dict)
    lists: frozenset[pytree.Path] = frozenset()
    of_all: set[pytree.Path] = field(default_factory=set)
    by_row: bool = False

    @property
    def known(self) -> bool:
        """Whether anything is known to carry the samples."""
        return bool(self.tensors or self.lists)

    @classmethod
    def of(cls, probe: Probe) -> BatchLayout:
        """The layout of the batches that a collate function makes.

        Two batches of copies of one item are compared: whatever grows with the number of copies carries the samples. Padding
        to the longest, sorting and trimming cannot be mistaken for it, and no other length that happens to match.

        Args:
            probe: samples and the loader's collate function.

        Returns:
            The layout; empty if the collate function takes no copies.
        """
        item, by_row = probe.items[0], len({item.rows for item in probe.items if isinstance(item, UnitItems)}) > 1
        if by_row:
            item = item.one_row()
        try:
            more, fewer = (probe.collate([copy.deepcopy(item) for _ in range(n)]) for n in _COPIES)
        except USER_CODE_ERRORS:
            return cls()
        tensors: dict[pytree.Path, SampleDim] = {}
        lists: set[pytree.Path] = set()
        _compare(more, fewer, (), tensors, lists)
        return cls(tensors, frozenset(lists), by_row=by_row)

    def samples(self, batch: Any) -> int | None:
        """Number of samples in a batch of the loader; ``None`` if it cannot be told."""
        found: set[int] = set()
        for path in self.lists:
            part = part_at(batch, path)
            found.add(len(part) if isinstance(part, (list, tuple)) else -1)
        for path, dim in self.tensors.items():
            leaf = part_at(batch, path)
            fits = isinstance(leaf, (torch.Tensor, np.ndarray)) and leaf.ndim > dim.dim
            found.add(leaf.shape[dim.dim] // dim.rows if fits and not leaf.shape[dim.dim] % dim.rows else -1)
        return found.pop() if len(found) == 1 and found != {-1} else None


def _compare(
    more: Any, fewer: Any, path: pytree.Path, tensors: dict[pytree.Path, SampleDim], lists: set[pytree.Path]
) -> None:
    arrays = isinstance(more, (torch.Tensor, np.ndarray)) and isinstance(fewer, (torch.Tensor, np.ndarray))
    if arrays:
        if more.ndim == fewer.ndim:
            grown = [d for d, (a, b) in enumerate(zip(more.shape, fewer.shape, strict=True)) if a != b]
            if len(grown) == 1 and more.shape[grown[0]] * _COPIES[1] == fewer.shape[grown[0]] * _COPIES[0]:
                tensors[path] = SampleDim(grown[0], more.shape[grown[0]] // _COPIES[0])
        return
    one, other = _children(more), _children(fewer)
    if one is None or other is None or len(path) > _DEEP:
        return
    if (len(one), len(other)) == _COPIES and isinstance(more, (list, tuple)):
        lists.add(path)
        return
    parts = dict(other)
    for key, part in one:
        if key in parts:
            _compare(part, parts[key], (*path, key), tensors, lists)


def _children(tree: Any) -> list[tuple[object, Any]] | None:
    """The direct parts of a container, or the attributes of an object that a collate function makes."""
    parts = pytree.children(tree)
    if parts is not None or isinstance(tree, (torch.Tensor, np.ndarray)):
        return parts
    attributes = getattr(tree, "__dict__", None)
    return list(attributes.items()) if isinstance(attributes, dict) and not isinstance(tree, type) else None


def leaves_of(tree: Any, path: pytree.Path = ()) -> Iterator[tuple[pytree.Path, Any]]:
    """All leaves of a batch with their paths, those in attributes of objects too."""
    parts = _children(tree) if len(path) <= _DEEP else None
    if parts is None:
        yield path, tree
    for key, part in parts or ():
        yield from leaves_of(part, (*path, key))


def part_at(tree: Any, path: pytree.Path) -> Any:
    """What is at a path of a batch; ``None`` if there is nothing."""
    for key in path:
        found = dict(_children(tree) or ())
        if key not in found:
            return None
        tree = found[key]
    return tree


# ------------------------------------------------------------------ other samples in the place of some


@dataclass(frozen=True)
class Exchange:
    """Which samples take the places of others.

    Attributes:
        order: for every place the number of the sample that takes it.
        of_all: whether numbers and tensors that depend on which samples there are become others.
        extreme: what whole numbers of the others are filled with, instead: ``torch.amin`` or ``torch.amax``.
        keep: the sample that stays.
    """

    order: tuple[int, ...]
    keep: int
    extreme: Callable[[torch.Tensor], torch.Tensor] | None = None
    of_all: bool = False

    def rows(self, tensor: torch.Tensor, rows: Rows) -> torch.Tensor:
        """A tensor with the samples exchanged.

        Args:
            tensor: laid out as ``rows`` says.

        Returns:
            A tensor of the same shape where all samples have the same number of rows; with ``extreme``, a tensor that does
            not hold whole numbers stays.
        """
        if self.extreme is None:
            return rows.exchange(tensor, self.order)
        if tensor.is_complex() or not tensor.numel() or not _whole(tensor) or rows.counts_rows(tensor):
            return tensor
        whole = tensor.to(torch.uint8) if tensor.dtype is torch.bool else tensor
        same = self.extreme(whole).to(tensor.dtype).expand_as(tensor).clone()
        rows.take(same, self.keep).copy_(rows.take(tensor, self.keep))
        return same

    def entries(self, entries: Any) -> Any:
        """A list of samples with the samples exchanged."""
        if self.extreme is not None:
            return entries
        picked = [entries[i] for i in self.order]
        return picked if isinstance(entries, list) else type(entries)(picked)

    def leaf(self, leaf: Any, rows: Rows) -> Any:
        """As :meth:`rows`, for arrays too."""
        if isinstance(leaf, np.ndarray):
            return self.rows(torch.from_numpy(np.ascontiguousarray(leaf)), rows).numpy()
        return self.rows(leaf, rows)

    def batch(self, batch: Any, layout: BatchLayout, samples: int) -> Any:
        """A delivered batch with the samples exchanged."""
        return self._tree(batch, layout, samples, ())

    def _tree(self, tree: Any, layout: BatchLayout, samples: int, path: pytree.Path) -> Any:
        if path in layout.lists:
            return self.entries(tree)
        if path in layout.tensors:
            return self.leaf(tree, Rows.of(layout.tensors[path], samples))
        if path in layout.of_all:
            return with_other_samples(tree) if self.of_all else tree
        if pytree.children(tree) is None and _children(tree):
            other = copy.copy(tree)
            for key, part in _children(tree) or ():
                setattr(other, str(key), self._tree(part, layout, samples, (*path, key)))
            return other
        return pytree.map_children(lambda key, part: self._tree(part, layout, samples, (*path, key)), tree)


def with_other_samples(value: Any) -> Any:
    """What a number or a tensor that depends on which samples there are might be with others."""
    if isinstance(value, (bool, np.bool_)) or (isinstance(value, torch.Tensor) and value.dtype is torch.bool):
        return ~value if isinstance(value, torch.Tensor) else not value
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value * torch.linspace(1.3, 2.9, value.numel(), dtype=value.dtype).view_as(value) + 0.1
    if isinstance(value, np.ndarray):
        return with_other_samples(torch.from_numpy(np.ascontiguousarray(value))).numpy()
    return 1.3 * value + 0.1 if isinstance(value, float) else value + 1


def _whole(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds labels, masks or ids: whole numbers, in whatever dtype."""
    return not tensor.is_floating_point() or bool((tensor == tensor.round()).all())


# ------------------------------------------------------------------ what was delivered


@dataclass(frozen=True)
class Source:
    """A part of a delivered batch.

    Attributes:
        delivery: the batch.
        held: gives the part, or ``None`` if the script has dropped it.
        dim: how a tensor or array carries the samples; ``None`` for one that carries none.
        entries: whether it is a list with one entry per sample.
        entry: for a part of such an entry, the list it is in, the number of the sample, and where it is in the entry.
        of_all: whether it depends on which samples there are, although it carries none.
    """

    delivery: Delivery
    held: Callable[[], Any]
    dim: SampleDim | None = None
    entries: bool = False
    entry: tuple[Any, int, pytree.Path] | None = None
    of_all: bool = False

    def exchanged(self, exchange: Exchange, value: Any) -> Any:
        """This part with the samples exchanged.

        Args:
            value: what it held when it was delivered.

        Returns:
            Another object, or the same if it carries no samples.
        """
        if self.entries:
            return exchange.entries(value)
        if self.of_all:
            return with_other_samples(value) if exchange.of_all else value
        if self.entry is not None:
            entries, number, path = self.entry
            return value if exchange.extreme is not None else part_at(entries[exchange.order[number]], path)
        return value if self.dim is None else exchange.leaf(value, Rows.of(self.dim, self.delivery.samples))


@dataclass(eq=False)
class Delivery:
    """One batch that the loader handed out.

    Attributes:
        tree: the batch, with weak references in the place of tensors and arrays.
        samples: how many it holds.
        draw: the ledger's draw of it.
        of_all: what it holds that depends on which samples there are, and carries none, tensors weakly.
    """

    tree: Any
    samples: int
    draw: Any = None
    of_all: tuple[Any, ...] = ()

    @property
    def batch(self) -> Any:
        """The batch as it was delivered; ``None`` if the script has dropped a part of it."""
        gone: list[bool] = []

        def leaf_of(_: pytree.Path, leaf: Any) -> Any:
            value = leaf() if isinstance(leaf, ref) else leaf
            gone.append(value is None and isinstance(leaf, ref))
            return value

        tree = pytree.map_leaves(leaf_of, self.tree)
        return None if any(gone) else tree

    @property
    def alive(self) -> bool:
        """Whether the script still holds a tensor of it."""
        return any(leaf() is not None for _, leaf in pytree.leaves(self.tree) if isinstance(leaf, ref))


class Sources(dict[int, Source]):
    """Parts of delivered batches by identity; a part that the script has dropped is not mistaken for what took its address."""

    def of(self, thing: Any) -> Source | None:
        """What a thing is in a delivered batch; ``None`` if it is in none."""
        source = self.get(id(thing))
        return source if source is not None and source.held() is thing else None


def delivered(batch: Any, layout: BatchLayout) -> tuple[Delivery, dict[int, Source]] | None:
    """What a delivered batch consists of.

    Returns:
        The delivery, and its parts by identity; ``None`` if it does not look like the batches of this loader.
    """
    samples = layout.samples(batch)
    if not samples:
        return None
    delivery = Delivery(pytree.map_leaves(lambda _, leaf: _weakly(leaf), batch), samples)
    delivery.of_all = tuple(_weakly(part_at(batch, path)) for path in layout.of_all)
    sources: dict[int, Source] = {}
    _register(batch, layout, (), delivery, sources)
    return delivery, sources


def _weakly(leaf: Any) -> Any:
    return ref(leaf) if isinstance(leaf, (torch.Tensor, np.ndarray)) or (_children(leaf) and _has_refs(leaf)) else leaf


def _has_refs(thing: Any) -> bool:
    return type(thing).__weakrefoffset__ != 0


def _register(
    tree: Any, layout: BatchLayout, path: pytree.Path, delivery: Delivery, sources: dict[int, Source]
) -> None:
    if path in layout.lists:
        sources[id(tree)] = Source(delivery, lambda: tree, entries=True)
        for number, entry in enumerate(tree):
            for place, leaf in pytree.leaves(entry):
                if isinstance(leaf, (torch.Tensor, np.ndarray)):
                    sources[id(leaf)] = Source(delivery, ref(leaf), entry=(tree, number, place))
        return
    if isinstance(tree, (torch.Tensor, np.ndarray)):
        sources[id(tree)] = Source(delivery, ref(tree), layout.tensors.get(path), of_all=path in layout.of_all)
        return
    for key, part in (_children(tree) or ()) if len(path) <= _DEEP else ():
        _register(part, layout, (*path, key), delivery, sources)

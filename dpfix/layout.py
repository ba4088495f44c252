"""Where the samples are: which dimension of every tensor that enters or leaves the model carries them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from dpfix import trees
from dpfix.errors import PlanBrokenError

_UNKNOWN = (0,)
"""Counts of a batch whose samples have unknown numbers of rows: they fit no tensor."""


@dataclass(frozen=True)
class SampleDim:
    """How a tensor carries the samples.

    Attributes:
        dim: the dimension.
        rows: rows per sample in that dimension.
        interleaved: rows of one sample are ``n`` apart (views stacked one after another), not adjacent.
        counts: empty if every sample has :attr:`rows` rows; else sample ``i`` has ``counts[i] * rows`` of them. In a plan
            these are the probe's, in a call of the model those of its batch (:meth:`CallLayout.having`).
    """

    dim: int
    rows: int = 1
    interleaved: bool = False
    counts: tuple[int, ...] = ()

    def samples(self, tensor: torch.Tensor) -> int:
        """Number of samples in a tensor.

        Args:
            tensor: a tensor laid out this way.

        Returns:
            Rows divided by rows per sample, rounded down; -1 if :attr:`counts` do not add up to the rows.
        """
        size = tensor.shape[self.dim]
        if self.counts:
            return len(self.counts) if size == sum(self.counts) * self.rows else -1
        return size // self.rows

    def having(self, counts: tuple[int, ...]) -> SampleDim:
        """The layout in a batch whose samples have other numbers of rows.

        Args:
            counts: the numbers.

        Returns:
            The layout; itself if every sample has the same number.
        """
        return replace(self, counts=counts or _UNKNOWN) if self.counts else self

    def take(self, tensor: torch.Tensor, sample: int, samples: int) -> torch.Tensor:
        """The rows of one sample.

        Args:
            tensor: a tensor laid out this way.
            sample: index of the sample.
            samples: number of samples in the tensor.

        Returns:
            A view.
        """
        if self.interleaved:
            index = [slice(None)] * tensor.dim()
            index[self.dim] = slice(sample, None, samples)
            return tensor[tuple(index)]
        if self.counts:
            first = sum(self.counts[:sample])
            return tensor.narrow(self.dim, first * self.rows, self.counts[sample] * self.rows)
        return tensor.narrow(self.dim, sample * self.rows, self.rows)

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The inverse of :meth:`take` over all samples.

        Args:
            parts: one tensor per sample.

        Returns:
            The batch.
        """
        if not self.interleaved:
            return torch.cat(tuple(parts), self.dim)
        stacked = torch.stack(tuple(parts), self.dim + 1)
        return stacked.flatten(self.dim, self.dim + 1)


Layout = tuple[tuple[trees.Path, SampleDim | None], ...]
"""For every tensor leaf its path, and how it carries the samples (``None``: it does not)."""


def having(layout: Layout, counts: tuple[int, ...]) -> Layout:
    """The layout of tensors in a batch whose samples have other numbers of rows.

    Args:
        layout: the layout.
        counts: the numbers.

    Returns:
        The layout.
    """
    return tuple((path, dim and dim.having(counts)) for path, dim in layout)


@dataclass(frozen=True)
class CallLayout:
    """How one call of ``forward`` carries the samples.

    Attributes:
        inputs: layout of ``(args, kwargs)``, without what is in ``lists``.
        output: layout of what is returned.
        signature: paths and numbers of dimensions of the input tensors; tells calls of different form apart.
        lists: paths of lists in ``(args, kwargs)`` that hold one entry per sample, each of a shape of its own;
            ``signature`` is that of a call with the first entry alone.
    """

    inputs: Layout
    output: Layout
    signature: tuple[tuple[trees.Path, int], ...]
    lists: tuple[trees.Path, ...] = ()

    def having(self, counts: tuple[int, ...]) -> CallLayout:
        """The layout of a call whose samples have other numbers of rows.

        Args:
            counts: the numbers.

        Returns:
            The layout.
        """
        return replace(self, inputs=having(self.inputs, counts), output=having(self.output, counts))

    def one(self, args: tuple[Any, ...], kwargs: dict[str, Any], sample: int = 0) -> Any:
        """The arguments with a single entry in every list of samples.

        Args:
            args: positional arguments.
            kwargs: keyword arguments.
            sample: which entry.

        Returns:
            ``(args, kwargs)``.
        """
        return (
            trees.map_at(lambda entries: [entries[sample]], (args, kwargs), self.lists)
            if self.lists
            else (args, kwargs)
        )


@dataclass(frozen=True)
class LayerCall:
    """How one call of a module that owns parameters carries the samples.

    Attributes:
        path: path of the module.
        number: how many calls of this module came before in the step.
        inputs: layout of ``(args, kwargs)``; ``None`` for a tensor that carries no samples (positions).
        output: layout of what is returned.
        problem: why the layout could not be told; empty if it could.
    """

    path: str
    number: int
    inputs: Layout
    output: Layout
    problem: str = ""

    def having(self, counts: tuple[int, ...]) -> LayerCall:
        """The layout of a call whose samples have other numbers of rows.

        Args:
            counts: the numbers.

        Returns:
            The layout.
        """
        return replace(self, inputs=having(self.inputs, counts), output=having(self.output, counts))


def signature(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[trees.Path, int], ...]:
    """What tells calls of different form apart.

    Args:
        args: positional arguments.
        kwargs: keyword arguments.

    Returns:
        Path and number of dimensions of every tensor.
    """
    return tuple((path, leaf.dim()) for path, leaf in trees.leaves((args, kwargs)) if torch.is_tensor(leaf))


def find_layout(layouts: Iterable[CallLayout], args: tuple[Any, ...], kwargs: dict[str, Any]) -> CallLayout | None:
    """How a call of the model carries its samples.

    Args:
        layouts: the plan's layouts.
        args: positional arguments.
        kwargs: keyword arguments.

    Returns:
        The layout; ``None`` if the probe has not shown such a call.
    """
    form = signature(args, kwargs)
    for layout in layouts:
        if layout.signature == (signature(*layout.one(args, kwargs)) if layout.lists else form):
            return layout
    return None


def known_layout(
    layouts: Iterable[CallLayout],
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    counts: tuple[int, ...] = (),
) -> CallLayout:
    """How a call of the model carries its samples, if the probe has shown such a call.

    Args:
        layouts: the plan's layouts.
        module: the model, for the message.
        args: positional arguments.
        kwargs: keyword arguments.
        counts: rows of every sample of the batch, where these are not the same for all.

    Returns:
        The layout.

    Raises:
        PlanBrokenError: the call has a form the probe has not shown.
    """
    layout = find_layout(layouts, args, kwargs)
    if layout is None:
        shapes = [tuple(t.shape) for t in trees.tensors((args, kwargs))]
        raise PlanBrokenError(
            f"{type(module).__name__}.forward was called with tensors of shapes {shapes}, in a form that the "
            "training step did not show when it was checked. Pass the training_step your loop really makes to "
            "make_private_safe, or call the model under torch.no_grad() where no gradient is needed."
        )
    return layout.having(counts)


def samples_in(layout: CallLayout, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Number of samples in a call of the model.

    Args:
        layout: how the call carries them.
        module: the model, for the message.
        args: positional arguments.
        kwargs: keyword arguments.

    Returns:
        The number.

    Raises:
        PlanBrokenError: the inputs hold different numbers of samples.
    """
    found = dict(trees.leaves(layout.one(args, kwargs)))
    counts = {dim.samples(found[path]) for path, dim in layout.inputs if dim is not None}
    trees.map_at(lambda entries: counts.add(len(entries)), (args, kwargs), layout.lists)
    if -1 in counts:
        raise PlanBrokenError(
            f"the rows of the inputs of {type(module).__name__} are not those of the batch that the data_loader delivered last, "
            "whose samples have different numbers of rows. Train on the batches of the returned data_loader as they are, "
            "without a BatchMemoryManager, or give every sample the same number of rows."
        )
    if len(counts) != 1:
        raise PlanBrokenError(
            f"the inputs of {type(module).__name__} hold different numbers of samples: {sorted(counts)}. "
            "Every tensor that carries samples has to carry the same ones."
        )
    return counts.pop()


def _lists_of_samples(whole: Any, parts: Sequence[Any], path: trees.Path = ()) -> list[trees.Path]:
    """Paths of the lists with one entry per sample: entry i is the one that sample i has alone."""
    singles = isinstance(whole, list) and all(isinstance(p, list) and len(p) == 1 for p in parts)
    if singles and len(whole) == len(parts) > 1 and all(_alike(whole[i], p[0]) for i, p in enumerate(parts)):
        return [path]
    keys = dict(trees.children(whole) or ())
    below = [dict(trees.children(p) or ()) for p in parts]
    return [
        found
        for key, child in keys.items()
        if all(key in b for b in below)
        for found in _lists_of_samples(child, [b[key] for b in below], (*path, key))
    ]


def _alike(a: Any, b: Any) -> bool:
    pairs = [trees.tensors(a), trees.tensors(b)]
    return (
        bool(pairs[0])
        and [t.shape for t in pairs[0]] == [t.shape for t in pairs[1]]
        and all(torch.equal(x, y) for x, y in zip(*pairs, strict=True))
    )


def layout_of_calls(
    together: Sequence[Any], alone: Sequence[Sequence[Any]], counts: tuple[int, ...] = ()
) -> tuple[tuple[CallLayout, ...], str]:
    """Tell the layout of every call from a step on a batch and steps on its samples alone.

    Args:
        together: calls of the step on the batch (objects with ``args``, ``kwargs``, ``output``).
        alone: the same for every sample alone.
        counts: rows of every sample, where these are not the same for all.

    Returns:
        The layouts, and why they could not be told (then the layouts are empty).
    """
    if not together:
        return (), "the training step never calls the model itself, only parts of it"
    if any(len(calls) != len(together) for calls in alone):
        return (), "the number of forward calls depends on the number of samples"
    found: dict[Any, CallLayout] = {}
    for number, call in enumerate(together):
        singles = [calls[number] for calls in alone]
        arguments, single_arguments = (call.args, call.kwargs), [(c.args, c.kwargs) for c in singles]
        lists = tuple(_lists_of_samples(arguments, single_arguments))
        others = [trees.map_at(lambda entries: [], a, lists) for a in (arguments, *single_arguments)]
        arguments = trees.map_at(lambda entries: entries[:1], arguments, lists)
        inputs, problem = _layout(others[0], others[1:], counts)
        if problem:
            return (), f"input of call {number} of the model: {problem}"
        output, problem = _layout(call.output, [c.output for c in singles], counts)
        if problem:
            return (), f"output of call {number} of the model: {problem}"
        layout = CallLayout(inputs, output, signature(*arguments), lists)
        if found.setdefault(layout.signature, layout) != layout:
            return (), "two calls of the same form carry their samples differently"
        if not lists and all(dim is None for _, dim in inputs):
            return (), "no input of the model carries the samples"
    return tuple(found.values()), ""


def layout_of_layers(together: Any, alone: Sequence[Any], row_counts: tuple[int, ...] = ()) -> tuple[LayerCall, ...]:
    """The layouts of all calls of the modules that own parameters.

    Args:
        together: calls by module path in the step on the batch.
        alone: the same for every sample alone.
        row_counts: rows of every sample, where these are not the same for all.

    Returns:
        One entry per call, with the reason where a layout could not be told.
    """
    out = []
    for path, calls in together.items():
        for number, call in enumerate(calls):
            if any(len(run.get(path, ())) != len(calls) for run in alone):
                out.append(LayerCall(path, number, (), (), "the number of calls depends on the number of samples"))
                continue
            singles = [run[path][number] for run in alone]
            inputs, bad_input = _layout((call.args, call.kwargs), [(c.args, c.kwargs) for c in singles], row_counts)
            output, bad_output = _layout(call.output, [c.output for c in singles], row_counts)
            problem = (bad_input and f"input {bad_input}") or (bad_output and f"output {bad_output}")
            out.append(LayerCall(path, number, inputs, output, problem))
    return tuple(out)


def _layout(batch: Any, singles: Sequence[Any], counts: tuple[int, ...] = ()) -> tuple[Layout, str]:
    whole = [(path, leaf) for path, leaf in trees.leaves(batch) if torch.is_tensor(leaf)]
    parts = [[(path, leaf) for path, leaf in trees.leaves(s) if torch.is_tensor(leaf)] for s in singles]
    if any([path for path, _ in p] != [path for path, _ in whole] for p in parts):
        return (), "its structure depends on the number of samples"
    mixed = _packed_problem(batch, singles)
    if mixed:
        return (), mixed
    layout: list[tuple[trees.Path, SampleDim | None]] = []
    for number, (path, leaf) in enumerate(whole):
        dim, problem = sample_dim(leaf, [p[number][1] for p in parts], counts)
        if problem:
            return (), f"tensor {'.'.join(map(str, path)) or 'itself'} of shape {tuple(leaf.shape)} {problem}"
        layout.append((path, dim))
    return tuple(layout), ""


def _packed_problem(batch: Any, singles: Sequence[Any]) -> str:
    """Whether the sequences of packed sequences are known to be in the order of the samples.

    One that has to be sorted (``enforce_sorted=True``) may have been sorted inside the model; that shows only if the
    sequences of the probe differ in length.

    Returns:
        What is wrong, or an empty string.
    """
    parts = [[leaf for _, leaf in trees.leaves(s) if isinstance(leaf, PackedSequence)] for s in singles]
    for number, whole in enumerate(leaf for _, leaf in trees.leaves(batch) if isinstance(leaf, PackedSequence)):
        padded, lengths = pad_packed_sequence(whole)
        ones = [p[number].data for p in parts if len(p) > number]
        if len(ones) != len(singles) or len(lengths) != len(ones):
            return "a packed sequence does not hold one sequence per sample"
        for i, (one, length) in enumerate(zip(ones, lengths, strict=True)):
            if one.shape != padded[:length, i].shape or not torch.allclose(one, padded[:length, i], 1e-3, 1e-5):
                return "a packed sequence holds the samples in another order"
        if whole.sorted_indices is None and len({int(n) for n in lengths}) == 1 and len(ones) > 1:
            return "a packed sequence may have been sorted, which cannot be told from sequences of one length"
    return ""


@dataclass(frozen=True)
class RowCounter:
    """Tells how many rows a sample has from what the dataset returns for it.

    Attributes:
        path: path of a list, a tuple, a tensor or an array in it.
        dim: dimension of the tensor or array; 0 for a list or tuple.
    """

    path: trees.Path
    dim: int = 0

    def count(self, item: Any) -> int:
        """Number of rows of a sample.

        Args:
            item: what the dataset returns.

        Returns:
            The number; 0 if the sample has another structure.
        """
        for key in self.path:
            found = dict(trees.children(item) or ())
            if key not in found:
                return 0
            item = found[key]
        sizes = _sizes(item)
        return sizes[self.dim] if self.dim < len(sizes) else 0


def find_row_counters(items: Sequence[Any], counts: tuple[int, ...]) -> list[RowCounter]:
    """Where a dataset's items hold the number of rows that they become.

    Args:
        items: samples, as the dataset returns them.
        counts: rows of each in a batch.

    Returns:
        All places with these numbers; lists and first dimensions come first.
    """
    places = [RowCounter(path, dim) for path, part in _parts(items[0]) for dim in range(len(_sizes(part)))]
    found = [c for c in places if tuple(c.count(item) for item in items) == counts]
    return sorted(found, key=lambda c: c.dim)


def _parts(tree: Any, path: trees.Path = ()) -> Iterator[tuple[trees.Path, Any]]:
    yield path, tree
    for key, part in trees.children(tree) or ():
        yield from _parts(part, (*path, key))


def _sizes(part: Any) -> tuple[int, ...]:
    if isinstance(part, (torch.Tensor, np.ndarray)):
        return tuple(part.shape)
    return (len(part),) if isinstance(part, (list, tuple)) else ()


def row_counts(together: Sequence[Any], alone: Sequence[Sequence[Any]]) -> tuple[int, ...]:
    """Rows of every sample in the model's inputs, where these are not the same for all.

    Args:
        together: calls of the model in the step on the batch.
        alone: the same for every sample alone.

    Returns:
        The numbers in the first tensor of that kind; empty if there is none.
    """
    for number, call in enumerate(together):
        parts = [trees.tensors((calls[number].args, calls[number].kwargs)) for calls in alone if number < len(calls)]
        for place, whole in enumerate(trees.tensors((call.args, call.kwargs))):
            shapes = [p[place].shape for p in parts if place < len(p)]
            if len(shapes) < len(alone) or any(len(s) != whole.dim() for s in shapes):
                continue
            for dim in range(whole.dim()):
                sizes = tuple(s[dim] for s in shapes)
                if len(set(sizes)) > 1 and sum(sizes) == whole.shape[dim]:
                    return sizes
    return ()


def sample_dim(
    whole: torch.Tensor, parts: list[torch.Tensor], counts: tuple[int, ...] = ()
) -> tuple[SampleDim | None, str]:
    """How a tensor of a batch carries the samples, told from the same tensor of every sample alone.

    Args:
        whole: the tensor in the batch.
        parts: the tensor for every sample alone.
        counts: rows of every sample in the model's inputs, where these are not the same for all.

    Returns:
        The layout (``None`` if the tensor carries no samples), and why it could not be told.
    """
    if any(p.dim() != whole.dim() for p in parts):
        return None, "changes its number of dimensions"
    if all(p.shape == whole.shape for p in parts):
        return None, ""
    dims = [d for d in range(whole.dim()) if whole.shape[d] == sum(p.shape[d] for p in parts)]
    grown = [d for d in dims if whole.shape[d] != parts[0].shape[d]]
    if len(grown) != 1:
        return None, "carries the samples in no dimension, or in several"
    dim = grown[0]
    rows = {p.shape[dim] for p in parts}
    if len(rows) != 1:
        every, left = divmod(parts[0].shape[dim], counts[0]) if counts else (0, 0)
        if left or any(p.shape[dim] != n * every for p, n in zip(parts, counts, strict=False)) or not every:
            return None, "has a different number of rows for different samples"
        ragged = SampleDim(dim, every, counts=counts)
        return (ragged, "") if _matches(whole, parts, ragged) else (None, "holds the rows of a sample apart")
    adjacent = SampleDim(dim, rows.pop())
    interleaved = SampleDim(dim, adjacent.rows, interleaved=True)
    if adjacent.rows > 1 and not _matches(whole, parts, adjacent) and _matches(whole, parts, interleaved):
        return interleaved, ""
    return adjacent, ""


def _matches(whole: torch.Tensor, parts: list[torch.Tensor], layout: SampleDim) -> bool:
    for sample, part in enumerate(parts):
        taken = layout.take(whole, sample, len(parts))
        if taken.shape != part.shape:
            return False
        if not torch.allclose(_real(taken), _real(part), rtol=1e-3, atol=1e-5, equal_nan=True):
            return False
    return True


def _real(tensor: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(tensor.to(torch.complex128)) if tensor.is_complex() else tensor.double()

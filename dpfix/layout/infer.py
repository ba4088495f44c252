"""Telling the layout from a step on a batch and steps on its samples alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from dpfix.instrument import pytree
from dpfix.layout.calls import CallLayout, LayerLayout, signature
from dpfix.layout.rows import Rows
from dpfix.layout.sample_dim import Layout, SampleDim


class ValuesNeededError(Exception):
    """Where the samples are cannot be told from shapes, and only these are there."""


def _lists_of_samples(whole: Any, parts: Sequence[Any], path: pytree.Path = ()) -> list[pytree.Path]:
    """Paths of the lists with one entry per sample: entry i is the one that sample i has alone."""
    singles = isinstance(whole, list) and all(isinstance(p, list) and len(p) == 1 for p in parts)
    if singles and len(whole) == len(parts) > 1 and all(_alike(whole[i], p[0]) for i, p in enumerate(parts)):
        return [path]
    keys = dict(pytree.children(whole) or ())
    below = [dict(pytree.children(p) or ()) for p in parts]
    return [
        found
        for key, child in keys.items()
        if all(key in b for b in below)
        for found in _lists_of_samples(child, [b[key] for b in below], (*path, key))
    ]


def _alike(a: Any, b: Any) -> bool:
    pairs = [pytree.tensors(a), pytree.tensors(b)]
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
        others = [pytree.map_at(lambda entries: [], a, lists) for a in (arguments, *single_arguments)]
        arguments = pytree.map_at(lambda entries: entries[:1], arguments, lists)
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


def layout_of_layers(together: Any, alone: Sequence[Any], row_counts: tuple[int, ...] = ()) -> tuple[LayerLayout, ...]:
    """The layouts of all calls of the modules that own parameters.

    Args:
        together: calls by module path in the step on the batch.
        alone: the same for every sample alone.
        row_counts: rows of every sample, where these are not the same for all.

    Returns:
        One entry per call, with the reason where a layout could not be told.

    Raises:
        ValuesNeededError: only the shape of a tensor is there (on the device ``meta``), which does not tell it.
    """
    out = []
    for path, calls in together.items():
        for number, call in enumerate(calls):
            if any(len(run.get(path, ())) != len(calls) for run in alone):
                out.append(LayerLayout(path, number, (), (), "the number of calls depends on the number of samples"))
                continue
            singles = [run[path][number] for run in alone]
            inputs, bad_input = _layout((call.args, call.kwargs), [(c.args, c.kwargs) for c in singles], row_counts)
            output, bad_output = _layout(call.output, [c.output for c in singles], row_counts)
            problem = (bad_input and f"input {bad_input}") or (bad_output and f"output {bad_output}")
            out.append(LayerLayout(path, number, inputs, output, problem))
    return tuple(out)


def _layout(batch: Any, singles: Sequence[Any], counts: tuple[int, ...] = ()) -> tuple[Layout, str]:
    whole = [(path, leaf) for path, leaf in pytree.leaves(batch) if torch.is_tensor(leaf)]
    parts = [[(path, leaf) for path, leaf in pytree.leaves(s) if torch.is_tensor(leaf)] for s in singles]
    if any([path for path, _ in p] != [path for path, _ in whole] for p in parts):
        return (), "its structure depends on the number of samples"
    mixed = _packed_problem(batch, singles)
    if mixed:
        return (), mixed
    layout: list[tuple[pytree.Path, SampleDim | None]] = []
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
    parts = [[leaf for _, leaf in pytree.leaves(s) if isinstance(leaf, PackedSequence)] for s in singles]
    for number, whole in enumerate(leaf for _, leaf in pytree.leaves(batch) if isinstance(leaf, PackedSequence)):
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
    if any(t.is_meta for t in (whole, *parts)):
        raise ValuesNeededError
    whole, *parts = (t.to_dense() for t in (whole, *parts))  # a sparse matrix: no rows can be taken out of it
    rows = Rows.of(layout, len(parts))
    for sample, part in enumerate(parts):
        taken = rows.take(whole, sample)
        if taken.shape[layout.dim] != part.shape[layout.dim] or not any(
            torch.allclose(_real(a), _real(b), rtol=1e-3, atol=1e-5, equal_nan=True) for a, b in _in_common(taken, part)
        ):
            return False
    return True


def _in_common(a: torch.Tensor, b: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Two tensors where both have places: a batch may be padded to its longest sample, at the end or at the beginning."""
    sizes = [min(x, y) for x, y in zip(a.shape, b.shape, strict=True)]
    yield a[tuple(slice(n) for n in sizes)], b[tuple(slice(n) for n in sizes)]
    if a.shape != b.shape:
        yield tuple(t[tuple(slice(m - n, m) for m, n in zip(t.shape, sizes, strict=True))] for t in (a, b))  # type: ignore[misc]


def _real(tensor: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(tensor.to(torch.complex128)) if tensor.is_complex() else tensor.double()

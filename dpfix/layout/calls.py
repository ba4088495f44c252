"""How the calls of the model and of its layers carry the samples."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from dpfix.errors import ForeignBatchError, PlanBrokenError
from dpfix.instrument import pytree
from dpfix.layout.sample_dim import Layout, by_row, having


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
    signature: tuple[tuple[pytree.Path, int], ...]
    lists: tuple[pytree.Path, ...] = ()

    def having(self, counts: tuple[int, ...]) -> CallLayout:
        """The layout of a call whose samples have other numbers of rows."""
        return replace(self, inputs=having(self.inputs, counts), output=having(self.output, counts))

    def by_row(self) -> CallLayout:
        """The layout of the same call if every row were a sample."""
        return replace(self, inputs=by_row(self.inputs), output=by_row(self.output))

    def rows(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
        """Number of samples in the first input of a call that has samples in a dimension, without a look at the others."""
        for path, dim in self.inputs:
            if dim is not None:
                return dim.samples(pytree.at((args, kwargs), path))
        return None

    def one(self, args: tuple[Any, ...], kwargs: dict[str, Any], sample: int = 0) -> Any:
        """The arguments with a single entry in every list of samples.

        Args:
            sample: which entry.

        Returns:
            ``(args, kwargs)``.
        """
        return (
            pytree.map_at(lambda entries: [entries[sample]], (args, kwargs), self.lists)
            if self.lists
            else (args, kwargs)
        )


@dataclass(frozen=True)
class LayerLayout:
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

    def having(self, counts: tuple[int, ...]) -> LayerLayout:
        """The layout of a call whose samples have other numbers of rows."""
        return replace(self, inputs=having(self.inputs, counts), output=having(self.output, counts))


def signature(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[pytree.Path, int], ...]:
    """What tells calls of different form apart.

    Returns:
        Path and number of dimensions of every tensor.
    """
    return tuple((path, leaf.dim()) for path, leaf in pytree.leaves((args, kwargs)) if torch.is_tensor(leaf))


def find_layout(layouts: Iterable[CallLayout], args: tuple[Any, ...], kwargs: dict[str, Any]) -> CallLayout | None:
    """How a call of the model carries its samples.

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
        counts: rows of every sample of the batch, where these are not the same for all.

    Returns:
        The layout.

    Raises:
        PlanBrokenError: the call has a form the probe has not shown.
    """
    layout = find_layout(layouts, args, kwargs)
    if layout is None:
        shapes = [tuple(t.shape) for t in pytree.tensors((args, kwargs))]
        raise PlanBrokenError(
            f"{type(module).__name__}.forward was called with tensors of shapes {shapes}, in a form that the "
            "training step did not show when it was checked.",
            help="Pass the training_step your loop really makes to make_private_safe, or call the model under "
            "torch.no_grad() where no gradient is needed.",
        )
    return layout.having(counts)


def samples_in(layout: CallLayout, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Number of samples in a call of the model.

    Returns:
        The number.

    Raises:
        PlanBrokenError: the inputs hold different numbers of samples.
        ForeignBatchError: an input holds a part of a sample.
    """
    found = dict(pytree.leaves(layout.one(args, kwargs)))
    counts = {dim.samples(found[path]) for path, dim in layout.inputs if dim is not None}
    pytree.map_at(lambda entries: counts.add(len(entries)), (args, kwargs), layout.lists)
    if -1 in counts and not any(dim.counts for _, dim in layout.inputs if dim is not None):
        rows = {dim.rows: found[path].shape[dim.dim] for path, dim in layout.inputs if dim is not None}
        several, size = next((rows, size) for rows, size in rows.items() if size % rows or not size)
        raise ForeignBatchError(
            f"an input of {type(module).__name__} has {size} rows, which are not {several} for each sample.",
            "Which row belongs to whom cannot be told.",
            "Train on the batches of the returned data_loader as they are: without rows that were added or left out. Call the "
            "model under torch.no_grad() where no gradient is needed.",
        )
    if -1 in counts:
        raise PlanBrokenError(
            f"the rows of the inputs of {type(module).__name__} are not those of the batch that the data_loader delivered last, "
            "whose samples have different numbers of rows.",
            help="Train on the batches of the returned data_loader as they are, or give every "
            "sample the same number of rows.",
        )
    if len(counts) != 1:
        raise PlanBrokenError(
            f"the inputs of {type(module).__name__} hold different numbers of samples: {sorted(counts)}.",
            help="Every tensor that carries samples has to carry the same ones.",
        )
    return counts.pop()

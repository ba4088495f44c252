"""Rows of a real call as samples, where the loop has made an argument itself: noise, time steps, another form of the data.

Which dimension of a tensor has a row per sample is taken from where the same values stand in the delivered batch. Where the
values are others, the first dimension has to be as long as there are samples, and nothing may speak for another one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from dpfix.errors import TrainingStepError
from dpfix.instrument import pytree
from dpfix.layout.infer import sample_dim
from dpfix.observe import probe
from dpfix.observe.call_sources import Call, Source, Sources
from dpfix.observe.probe import Probe

Rows = dict[pytree.Path, torch.Tensor]

Dims = dict[pytree.Path, int]
"""The dimension with a row per sample, by the place of the tensor."""


@dataclass(frozen=True)
class RowDims:
    """Finds the dimension with a row per sample in the tensors of a call.

    Args:
        call: the call.
        sources: what of it is of the delivered batch.
        in_batch: the same dimension, for the tensors of a batch.
    """

    call: Call
    sources: Sources
    in_batch: Dims

    def readings(self, module: nn.Module, sized: Collection[pytree.Path]) -> list[Dims]:
        """The dimension for every tensor that has one.

        Args:
            module: the model, for the message.
            sized: tensors that were made of sizes, of which it cannot be told whether they have a row per sample.

        Returns:
            The dimensions if they have one, and if not; there is at least one dimension.

        Raises:
            TrainingStepError: it cannot be told.
        """
        dims = {path: dim for path, t in self.call.tensors if (dim := self._certain(path, t)) is not None}
        first = 0 in dims.values() or any(self._keeps_rows(t) for _, t in self.call.tensors)
        for path, t in self.call.tensors:
            if path in dims or self.call.samples not in t.shape:
                continue
            if first and len(t) == self.call.samples:
                dims[path] = 0
            elif path not in sized:
                raise TrainingStepError(*self._unknown(module), path="training_step")
        if not dims:
            raise TrainingStepError(*self._unknown(module), path="training_step")
        without = {path: dim for path, dim in dims.items() if path not in sized}
        return [dims, without] if without and len(without) < len(dims) else [dims]

    def _certain(self, path: pytree.Path, t: torch.Tensor) -> int | None:
        if path in self.sources.places:
            dim = self.in_batch.get(self.sources.places[path])
            return dim if dim is not None and t.shape[dim] == self.call.samples else None
        n = self.call.samples
        candidates = [dim for dim, size in enumerate(t.shape) if size == n]
        whole = [dim for dim, size in enumerate(t.shape) if size % n == 0]
        if candidates == whole == [0]:
            return 0
        leaves = [(self.in_batch[there], leaf) for there, leaf in self._leaves()]
        pairs = [(d, t.transpose(0, d), leaf.transpose(0, dim)) for d in candidates for dim, leaf in leaves]
        same = (d for d, rows, others in pairs if _same_rows(rows, others) or _slices(rows, others))
        like = (dim for dim, leaf in leaves if leaf.shape == t.shape and t.shape[dim] == n)
        return next(same, next(like, None))

    def _leaves(self) -> list[tuple[pytree.Path, torch.Tensor]]:
        found = self.call.delivered
        return [(path, t) for path, t in found if path in self.in_batch and isinstance(t, torch.Tensor)]

    def _keeps_rows(self, t: torch.Tensor) -> bool:
        """Whether a tensor may be one of the batch with other dimensions behind the first."""
        first = t.dim() and len(t) == self.call.samples
        return bool(first) and any(self.in_batch[p] == 0 and leaf.numel() == t.numel() for p, leaf in self._leaves())

    def _unknown(self, module: nn.Module) -> tuple[str, str, str]:
        shapes = ", ".join(f"{place(path)} {tuple(t.shape)}" for path, t in self.call.tensors) or "no tensor"
        return (
            f"{type(module).__name__} was called with {shapes}, for {self.call.samples} sample(s) of the data_loader, and it "
            "cannot be told which rows belong to which sample.",
            "Clipping per sample needs that. No parameter has moved.",
            "Pass training_step=lambda model, batch: <the loss your loop computes> to make_private_safe.",
        )


def dims_in_batch(usual: Probe) -> Dims:
    """The dimension with one row per sample, for every tensor of the loader's batches that has one."""
    dims: Dims = {}
    for path, whole in pytree.leaves(usual.batch):
        parts = [dict(pytree.leaves(single)).get(path) for single in usual.singles]
        if isinstance(whole, torch.Tensor) and all(isinstance(p, torch.Tensor) for p in parts):
            dim, problem = sample_dim(whole, parts)  # type: ignore[arg-type]
            if dim is not None and not problem and dim.rows == 1:
                dims[path] = dim.dim
    return dims


MOST_COMPARED = 10_000_000
"""Numbers that are compared in the search for a slice of a tensor, at most."""


def _rows(t: torch.Tensor) -> torch.Tensor:
    return t.detach().as_subclass(torch.Tensor).reshape(len(t), -1)


def _same_rows(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether every row of one tensor has the values of that row of the other, in any order."""
    if len(a) != len(b) or a.numel() != b.numel() or a.is_complex() or b.is_complex():
        return False
    return torch.equal(_rows(a).sort(1).values, _rows(b).to(a).sort(1).values)


def _slices(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether every row of one tensor is a slice of that row of the other, and not of any other row as well."""
    if len(a) != len(b) or len(a) < 2 or not 0 < a.numel() < b.numel():
        return False
    whole, part = _rows(b).to(a), _rows(a)
    windows = whole.unfold(1, part.shape[1], 1)
    if windows.numel() > MOST_COMPARED:
        return False
    own, other = ((w == part[:, None]).all(-1).any(-1) for w in (windows, windows.roll(1, 0)))
    return bool(own.all()) and not bool(other.all())


def from_rows(call: Call, dims: Mapping[pytree.Path, int]) -> tuple[Source, Probe, Rows]:
    """A call whose rows are the samples; a single one is taken twice.

    Returns:
        The arguments as a function of the rows, the probe, and copies of the tensors that carry no samples.
    """
    tensors = {path: t.detach().as_subclass(torch.Tensor) for path, t in call.tensors}
    fixed = {path: t.clone() for path, t in tensors.items() if path not in dims}

    def row(i: int) -> Rows:
        return {p: tensors[p].narrow(d, i % call.samples, 1).clone() for p, d in dims.items()}

    def collate(items: list[Rows]) -> Rows:
        return {p: torch.cat([item[p] for item in items], d) for p, d in dims.items()}

    arguments = pytree.map_leaves(lambda p, leaf: None if p in tensors else leaf, call.arguments)

    def source(rows: Rows) -> tuple[tuple[object, ...], dict[str, object]]:
        values = fixed | rows
        return pytree.map_leaves(values.get, arguments)  # type: ignore[arg-type]

    items = [row(i) for i in range(max(2, min(probe.SAMPLES, call.samples)))]
    return source, probe.redrawn(items, collate), fixed


def place(path: pytree.Path) -> str:
    """A place in a call, in words."""
    root, name, *rest = path
    inside = "".join(f"[{key!r}]" for key in rest)
    return f"argument {name}{inside}" if root == 0 else f"argument `{name}`{inside}"


def made_of_sizes(tensor: torch.Tensor) -> bool:
    """Whether a tensor is one that scripts make of sizes alone: positions, ones, a causal mask."""
    values = tensor.detach().as_subclass(torch.Tensor)
    if not values.numel() or not values.dim() or values.is_complex() or values.layout is not torch.strided:
        return not values.numel()
    flat = values.reshape(-1)
    if bool((flat == flat[0]).all()):
        return True
    if values.dim() > 2 and bool((values == values[:1]).all()):
        return made_of_sizes(values[0])
    last = values.shape[-1]
    if bool((values == torch.arange(last).to(values)).all()):
        return True
    if values.dim() != 2 or len(values) != last:
        return False
    lower = torch.ones_like(values, dtype=torch.bool).tril()
    return all(bool((part == part[0]).all()) for part in (values[lower], values[~lower]))

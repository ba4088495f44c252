"""Batches of one behind an ordinary ``loss.backward()``.

In a training forward pass the model runs once per sample, each time with an alias of every parameter that belongs to
that sample; the outputs are joined to the batch the script expects. The script's own ``backward()`` then leaves the
gradient of sample i on alias i, whatever the layers in between do. Slow, and always right: sample i never meets
sample j inside the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from dpfix.engines.base import Engine, Verdict, per_sample
from dpfix.engines.functional.parameter_swap import Aliases, swapped
from dpfix.engines.per_sample.handle import AliasHandle
from dpfix.instrument import pytree
from dpfix.layout.calls import CallLayout
from dpfix.layout.rows import Rows, rows_of
from dpfix.plan import Plan


class Microbatch(Engine):
    """The engine."""

    name = "microbatch"
    opacus_mode = "no_op"
    last_resort = True

    @override
    def supports(self, module: nn.Module, record: Any) -> Verdict:
        return Verdict(record.layout_problem)

    @override
    def attach(self, module: nn.Module, plan: Plan, prepared: Any = None) -> MicrobatchHandle:
        return MicrobatchHandle(module, plan)


class MicrobatchHandle(AliasHandle):
    """The engine at work on one model."""

    @override
    def aliases_for(self, samples: int) -> list[Aliases]:
        return [{name: p.detach().requires_grad_() for name, p in self._parameters.items()} for _ in range(samples)]

    @override
    def run(self, layout: CallLayout, args: Any, kwargs: Any, samples: int, aliases: list[Aliases]) -> Any:
        singles = samples_of_call(layout, args, kwargs, samples)
        outputs = [self._one(*arguments, own) for arguments, own in zip(singles, aliases, strict=True)]
        return join_outputs(layout, outputs, self.weight(samples))

    def _one(self, args: Any, kwargs: Any, own: Aliases) -> Any:
        """The output of a sample, whose parameters are its own."""
        with swapped(self.slots, own):
            return self.original(*args, **kwargs)

    @override
    def fill(self, out: torch.Tensor, aliases: list[Aliases], name: str, scale: float | torch.Tensor) -> None:
        for i, one in enumerate(aliases):
            grad = one[name].grad
            if grad is not None:
                torch.mul(grad, scale[i].to(grad) if isinstance(scale, torch.Tensor) else scale, out=out[i])


def samples_of_call(layout: CallLayout, args: Any, kwargs: Any, samples: int) -> Iterator[tuple[Any, Any]]:
    """The arguments of a call, one sample after the other.

    Args:
        layout: how they carry the samples.
        args: of the batch.
        kwargs: of the batch.
        samples: how many there are.

    Yields:
        Positional and keyword arguments of a sample.
    """
    found = dict(pytree.leaves(layout.one(args, kwargs)))
    rows = {path: rows_of(found[path], dim, samples) for path, dim in layout.inputs if dim is not None}

    for i in range(samples):

        def take(path: pytree.Path, leaf: Any, i: int = i) -> Any:
            return rows[path].take(leaf, i) if path in rows else leaf

        yield pytree.map_leaves(take, layout.one(args, kwargs, i))


def join_outputs(layout: CallLayout, outputs: list[Any], weight: float | torch.Tensor) -> Any:
    """Put the outputs of single samples together to the output of the batch.

    Args:
        layout: how the output carries the samples.
        outputs: one output per sample.
        weight: what a scalar per sample (a loss that the model computes) is multiplied with before they are added up.

    Returns:
        A tree like each output. Tensors that carry samples are joined; scalars that carry gradient are added
        up; all else is the first sample's.
    """
    dims = dict(layout.output)
    parts = [dict(pytree.leaves(o)) for o in outputs]

    def join(path: pytree.Path, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        dim = dims.get(path)
        tensors = [p[path] for p in parts]
        if dim is not None:
            return Rows.of(dim, len(outputs)).join(tensors)
        if leaf.requires_grad and leaf.dim() == 0:
            stacked = torch.stack(tensors)
            return (stacked * per_sample(weight, stacked)).sum()
        return leaf

    return pytree.map_leaves(join, outputs[0])

"""The engine at work on one model: which layers are recorded, what has arrived, norms and clipped sums."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from dpfix.engines.base import Handle, no_counts, per_sample, zeros
from dpfix.engines.bookkeeping.cancellation import Parts, certain
from dpfix.engines.bookkeeping.contributions import Contribution
from dpfix.engines.bookkeeping.iteration import LayerIteration, RootCall
from dpfix.engines.bookkeeping.small_parameters import Together, put_together
from dpfix.engines.bookkeeping.tied_parameters import add_up
from dpfix.engines.iterations import Iterations
from dpfix.engines.replaced import Replaced
from dpfix.errors import PlanBrokenError
from dpfix.instrument.memento import Modes
from dpfix.instrument.parameter_uses import MARK, function_in, used_in
from dpfix.instrument.sharded import Shards, is_sharded
from dpfix.layout.calls import CallLayout, LayerLayout, known_layout, samples_in
from dpfix.plan import Plan

Weighted = Callable[[], torch.Tensor]
"""Computes what one iteration has brought for a parameter."""


class BookkeepingHandle(Handle):
    """The engine at work on one model.

    Args:
        plan: how its calls carry their samples.
    """

    clips = True

    def __init__(self, module: nn.Module, plan: Plan) -> None:
        self.model, self.plan = module, plan
        self.counts: Callable[[], tuple[int, ...]] = no_counts
        self.anchor = torch.zeros((), requires_grad=True)
        self._layers: dict[str, list[LayerLayout]] = {}
        for layer in plan.layers:
            self._layers.setdefault(layer.path, []).append(layer)
        self._iterations = Iterations(module, LayerIteration)
        self._active: RootCall | None = None
        self._last: RootCall | None = None
        self._replaced: list[Replaced] = []
        self.shards = Shards(module) if is_sharded(module) else None

    def put_in(self, replaced: Replaced) -> None:
        """Let something stand in for a module's ``forward`` until :meth:`detach`."""
        self._replaced.append(replaced)
        replaced.put_in()

    @override
    def detach(self) -> None:
        for replaced in reversed(self._replaced):
            replaced.take_out()
        self._replaced.clear()
        self.finish()
        self._last = None

    # -------------------------------------------------------------- calls

    def held(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """Parameters by name as the model holds them now: whole ones, where it is spread over processes."""
        return {name: p if self.shards is None else self.model.get_parameter(name) for name, p in parameters.items()}

    def call_layout(self, args: Any, kwargs: Any) -> CallLayout:
        """How a call of the model carries its samples."""
        return known_layout(self.plan.calls, self.model, args, kwargs, self.counts())

    @contextmanager
    def root_call(self, layout: CallLayout, args: Any, kwargs: Any) -> Iterator[RootCall]:
        """The model is being called.

        Yields:
            The call.
        """
        samples = samples_in(layout, self.model, args, kwargs)
        call, before = RootCall(samples, self._iterations.present(), self._iterations.late), self._active
        call.shards = self.shards
        calls, modes = dict(call.iteration.calls), Modes()
        try:
            self._active = self._last = call
            yield call
            self._active = before
        except BaseException:  # a call that was not finished does not count
            self._active, call.iteration.calls = before, calls
            modes.put_back()
            raise

    def present_call(self) -> RootCall | None:
        """The call of the model that is going on; while checkpointing recomputes, the one that it repeats.

        Returns:
            The call, or ``None`` outside the model.
        """
        if self._active is None and torch._C._current_graph_task_id() != -1:  # type: ignore[attr-defined]
            return self._last
        return self._active

    def count_call(self, path: str) -> int:
        """Count a call of a module in this step.

        Returns:
            How many came before.
        """
        if self._active is None:
            return 0
        calls = self._active.iteration.calls
        calls[path] = calls.get(path, 0) + 1
        return calls[path] - 1

    def shown(self, path: str) -> bool:
        """Whether the probe has shown a call of a layer, or a use of a parameter."""
        return path in self._layers

    def layout(self, path: str, number: int) -> LayerLayout:
        """How a call of a layer carries its samples.

        Args:
            number: how many calls of it came before in this step.

        Returns:
            The layout.

        Raises:
            PlanBrokenError: the probe has not shown such a call, or its layout could not be told.
        """
        known = self._layers.get(path, [])
        if not known or (number >= len(known) and any(_form(c) != _form(known[0]) for c in known)):
            raise PlanBrokenError(
                f"{_described(path)} of {type(self.model).__name__} was called {number + 1} time(s) in one step, but "
                f"{len(known)} time(s) in the training step that was checked.",
                help="Pass the training_step your loop really makes to make_private_safe.",
                path=path,
            )
        found = known[min(number, len(known) - 1)]
        if found.problem:
            raise PlanBrokenError(
                f"it cannot be told which rows of {_described(path)} of {type(self.model).__name__} belong to which sample "
                f"({found.problem}).",
                path=path,
            )
        return found.having(self.counts()) if self.plan.row_counter else found

    # -------------------------------------------------------------- gradients

    @property
    @override
    def busy(self) -> bool:
        return self._iterations.begun

    @override
    def clear(self) -> None:
        self._iterations.clear()

    @override
    def finish(self) -> None:
        self._iterations.finish()

    @override
    @torch.no_grad()
    def collect(self, parameters: list[nn.Parameter]) -> list[int]:
        arrived = self._iterations.arrived()
        for p in parameters:
            parts = []
            for samples, found in arrived:
                own = found.get(p)
                scale = self.plan.scale(samples, self.counts())
                if own is None:
                    parts.append(zeros(p, samples))
                    continue
                gradients = add_up(own).per_sample()
                parts.append(gradients * per_sample(scale, gradients))
            p.grad_sample = parts[0] if len(parts) == 1 else parts or None  # type: ignore[attr-defined]
        return [samples for samples, _ in arrived]

    @override
    def announce(self, parameters: list[nn.Parameter]) -> list[int]:
        # Opacus's optimizer tells the number of iterations from the number of tensors; nothing may use their values.
        counts = [samples for samples, _ in self._iterations.arrived()]
        alike: dict[Any, list[torch.Tensor]] = {}
        for p in parameters:
            parts = alike.get(kind := (p.dim(), p.dtype, p.device))
            if parts is None:
                like = {"dtype": p.dtype, "device": p.device}
                parts = alike[kind] = [torch.full((n, *[1] * p.dim()), torch.nan, **like) for n in counts]
            p.grad_sample = parts[0] if len(parts) == 1 else [*parts] or None  # type: ignore[attr-defined]
        return counts

    @override
    @torch.no_grad()
    def clip_and_accumulate(
        self, parameters: list[nn.Parameter], max_grad_norm: float, *, keep: bool = True
    ) -> torch.Tensor | None:
        every, groups, parts = [], self._groups(parameters), dict[nn.Parameter, list[Weighted]]()
        for samples, found in self._iterations.arrived():
            take = found.__getitem__ if keep else found.pop  # what is not needed any more is given up piece by piece
            whole = {p: add_up(take(p)) for p in parameters if p in found}
            if not keep:
                found.clear()
            norms, clipped = self._measured(whole, groups, max_grad_norm, samples)
            every.append(norms)
            whole.clear()
            left_out = None if bool(torch.isfinite(norms).all()) else ~torch.isfinite(norms).all(1)
            for own, factors in clipped:
                times = factors if left_out is None else factors.masked_fill(left_out.to(factors.device), 0)
                while own:
                    p, part = own.popitem()
                    if left_out is not None:
                        part = part.without(left_out.to(p.device))
                    for q, work in _weighted(p, part, times.to(p.device)):
                        parts.setdefault(q, []).append(work)
        for p in parameters:
            self._add(p, parts.pop(p, []))
        return torch.cat(every) if every else None

    def _add(self, p: nn.Parameter, parts: list[Weighted]) -> None:
        """Add what the iterations have brought for a parameter to its sum."""
        sums = (work().to(p.dtype) for work in parts)
        if self.shards is not None:
            self.shards.add(p, functools.reduce(torch.Tensor.add_, sums) if parts else None)
            return
        for total in sums:
            _accumulate(p, total)
        if getattr(p, "summed_grad", None) is None:
            p.summed_grad = torch.zeros_like(p, requires_grad=False)  # type: ignore[attr-defined]

    def _measured(
        self, whole: Parts, groups: list[list[nn.Parameter]], max_grad_norm: float, samples: int
    ) -> tuple[torch.Tensor, list[tuple[Parts, torch.Tensor]]]:
        """Norms, shape ``[samples, groups]``, on the CPU; every group's parts, without what rounding spoils, and factors."""
        scheme, scale, norms, clipped = self.plan.clipping, self.plan.scale(samples, self.counts()), [], []
        for group, clip_norm in zip(groups, scheme.clip_norms(max_grad_norm), strict=True):
            own = put_together({p: whole[p] for p in group if p in whole})
            if own:
                own, squared = certain(own, clip_norm, scale, scheme)
            else:
                squared = torch.zeros(samples, device=group[0].device)
            times = scale.to(squared) if isinstance(scale, torch.Tensor) else scale
            norms.append(squared.sqrt() * times)
            clipped.append((own, scheme.factors(norms[-1], clip_norm) * times))
        return torch.stack([n.to(norms[0]) for n in norms], 1).cpu(), clipped

    def _groups(self, parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
        """The parameters that are clipped together, group by group."""
        scheme = self.plan.clipping
        if not scheme.groups:
            return [parameters]
        names = {p: name for name, p in self.model.named_parameters()}
        return [[parameters[i] for i in of] for of in scheme.members([names[p] for p in parameters])]


def _weighted(p: nn.Parameter, part: Contribution, factors: torch.Tensor) -> Iterable[tuple[nn.Parameter, Weighted]]:
    """What computes the clipped sums of the parameters that a contribution is of."""
    if isinstance(part, Together):
        sums = part.weighted_sums(factors)
        return [(q, functools.partial(sums.__getitem__, q)) for q in sums]
    return [(p, functools.partial(part.weighted_sum, factors))]


def _accumulate(p: nn.Parameter, total: torch.Tensor) -> None:
    if getattr(p, "summed_grad", None) is None:
        p.summed_grad = total  # type: ignore[attr-defined]
    else:
        p.summed_grad += total  # type: ignore[attr-defined]


def _described(path: str) -> str:
    return f"function `{function_in(path)}` on `{'`, `'.join(used_in(path))}`" if MARK in path else f"layer `{path}`"


def _form(call: LayerLayout) -> Any:
    return call.inputs, call.output, call.problem

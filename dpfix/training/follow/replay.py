"""Repeating what the script did, call by call, with other samples in the place of some."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from typing_extensions import override

from dpfix.errors import USER_CODE_ERRORS
from dpfix.instrument import pytree
from dpfix.instrument.own_draws import draws_from
from dpfix.instrument.rng import rng_untouched
from dpfix.layout.rows import Rows
from dpfix.layout.sample_dim import SampleDim
from dpfix.training.follow.calls import Call, ModelCall, line_of, parts_of, storage_of, writes
from dpfix.training.follow.delivery import Exchange, Source, Sources, with_other_samples
from dpfix.training.follow.follower import Follower
from dpfix.training.follow.numbers import Told, numbers_in
from dpfix.training.follow.outside import comes_from
from dpfix.training.follow.placement import Placement, placement
from dpfix.training.follow.step import DecidesError, NotFollowedError, RealStep, Repeated, Way, close, tensors_of

_CUTS = frozenset({"__getitem__", "narrow", "split", "chunk"})
"""Functions with which scripts cut padding off."""


class Replay(Way):
    """The calls from a delivered batch to the loss, repeated with other values.

    Args:
        follower: wrote them down.
        step: the step.

    Attributes:
        calls: those that the loss is made of, in order.
    """

    def __init__(self, follower: Follower, step: RealStep) -> None:
        if follower.broken:
            raise NotFollowedError(follower.broken)
        self._step, self._kept, self._sources = step, follower.kept, follower.sources
        self._unknown_form = follower.unknown_form
        self.calls, self._asides = path_to(step.loss, follower.calls)
        if not any(id(t) == id(step.loss) for call in self.calls for t in pytree.tensors(call.result)):
            raise NotFollowedError("the loss is not made by torch functions from the model's outputs")
        self._guessed = self._guess() if not step.deliveries else {}
        self._told: list[Told] = []  # of the repetition with the very samples
        self._arguments: list[Any] = []
        base = self._run(None, None)
        self._told = base.told
        self.base = base.repeated
        self._arguments = self.base.arguments
        self._check_repeats()

    @override
    def repeat(self, exchange: Exchange | None) -> Repeated:
        return self.base if exchange is None else self._run(exchange, None).repeated

    def told(self, exchange: Exchange) -> list[Told]:
        """Python numbers that the script has read from the batch, or may have, and what they are with other samples."""
        return self._run(exchange, None).told

    def with_numbers(self, exchange: Exchange, changes: Mapping[tuple[int, int | str], Any]) -> Repeated:
        """The repetition with other samples, in which numbers that followed from the samples follow the others.

        Args:
            changes: new numbers by the number of the call and of its argument.

        Returns:
            Arguments and gradients.
        """
        return self._run(exchange, changes).repeated

    def with_lengths(self, exchange: Exchange) -> list[Any]:
        """The arguments of the model with other samples, where lengths that were read from the batch follow them.

        A batch that is trimmed to its longest sample has another shape then.

        Returns:
            The arguments of every call; empty if no slice or index of the script equals a number that it has read.
        """
        told = [pair for one in self._run(exchange, None).told for pair in one.numbers]
        lengths = {int(a): int(b) for a, b in told if a.is_integer() and b.is_integer() and a > 1}
        last = max(k for k, call in enumerate(self.calls) if isinstance(call, ModelCall))
        calls = [c for c in self.calls[:last] if isinstance(c, Call) and c.name in _CUTS]
        if not any(part in lengths for c in calls for part in parts_of(c.args) if type(part) is int):
            return []
        run = _Run(self._step, self._kept, self._sources, self._guessed, exchange, {}, (), (), lengths=lengths)
        with rng_untouched():
            for number, call in enumerate(self.calls[: last + 1]):
                run.call(number, call, needed=number not in self._asides)
        return run.arguments

    def line_of_argument(self, call: ModelCall, path: pytree.Path) -> str:
        """Where the script made an argument of a call of the model, as ``file:line``."""
        wanted = dict(pytree.leaves((call.args, call.kwargs))).get(path)
        makers = (
            c for c in reversed(self.calls) if isinstance(c, Call) and any(wanted is t for t in parts_of(c.result))
        )
        maker = next(makers, None)
        return "" if maker is None else line_of(maker.place)

    # -------------------------------------------------------------- what is known without a delivery

    def _guess(self) -> dict[int, SampleDim]:
        """Labels and masks of a batch that nobody has delivered, by their length: no floating values, which may be settings."""
        n, found = self._step.samples, dict[int, SampleDim]()
        made = {id(t) for call in self.calls for t in pytree.tensors(call.result)}
        for call in self.calls:
            for t in pytree.tensors((call.args, call.kwargs)):
                if id(t) not in made and not t.is_floating_point() and t.dim() and t.shape[0] == n:
                    found[id(t)] = SampleDim(0)
        return found

    # -------------------------------------------------------------- checks of the repetition itself

    def _check_repeats(self) -> None:
        """The repetition must be the very step: numbers from elsewhere, or a custom ``autograd.Function``, are not seen."""
        if (self._sources or self._unknown_form) and not self._step.deliveries:
            raise NotFollowedError("the arguments of the model do not come from the delivered batch by torch functions")
        for call, arguments in zip(self._step.calls, self.base.arguments, strict=True):
            for (_, t), (_, again) in zip(call.arguments, tensors_of(arguments), strict=True):
                if not close(again.detach(), t.detach()):
                    raise NotFollowedError("the arguments of the model are not made by torch functions from the batch")
        for real, again in zip(self._step.gradients, self.base.gradients, strict=True):
            for a, b in zip(real, again, strict=True):
                if a is not None and not close(b, a):
                    raise NotFollowedError(
                        "its gradient is not the one of the functions it calls (a custom autograd.Function)"
                    )

    # -------------------------------------------------------------- repeating

    def _run(self, exchange: Exchange | None, changes: Mapping[tuple[int, int | str], Any] | None) -> _Ran:
        run = _Run(
            self._step, self._kept, self._sources, self._guessed, exchange, changes or {}, self._told, self._arguments
        )
        with rng_untouched():
            for number, call in enumerate(self.calls):
                run.call(number, call, needed=number not in self._asides)
            return run.finish()


@dataclass
class _Ran:
    repeated: Repeated
    told: list[Told]


@dataclass
class _Run:
    step: RealStep
    kept: Mapping[int, torch.Tensor]
    sources: Sources
    guessed: Mapping[int, SampleDim]
    exchange: Exchange | None
    changes: Mapping[tuple[int, int | str], Any]
    base: Sequence[Told]
    base_arguments: Sequence[Any]
    values: dict[int, Any] = field(default_factory=dict)
    leaves: list[list[torch.Tensor]] = field(default_factory=list)
    arguments: list[Any] = field(default_factory=list)
    told: list[Told] = field(default_factory=list)
    columns: list[tuple[list[Any], list[Any]]] | None = None
    lengths: Mapping[int, int] = field(default_factory=dict)
    placement: Placement | None = None

    def call(self, number: int, call: Call | ModelCall, *, needed: bool) -> None:
        if isinstance(call, ModelCall):
            self._model(call)
            return
        try:
            self._function(number, call)
        except USER_CODE_ERRORS as error:
            if call.tells:
                self.told.append(Told(call.place, None, None))
            if needed:
                line = line_of(call.place)
                raise NotFollowedError(f"{call.name} does not repeat ({line}): {_first_line(error)}") from error

    def _function(self, number: int, call: Call) -> None:
        hooked = _by_a_backward_hook(call.result)
        made = isinstance(call.result, torch.Tensor) and call.result.grad_fn is not None
        made = made and call.result._version == call.version and not writes(call.name, call.kwargs)
        if made and not call.grad and not hooked:
            raise NotFollowedError("it calls a custom autograd.Function, whose forward does not tell its gradient")
        args, kwargs = self.swapped(call.args), self.swapped(call.kwargs)
        if self.lengths and call.name in _CUTS:
            args = pytree.map_leaves(self._cut, args)
        if self.changes:
            args = tuple(self.changes.get((number, k), a) for k, a in enumerate(args))
            kwargs = {k: self.changes.get((number, k), v) for k, v in kwargs.items()}
        with ExitStack() as around:
            around.enter_context(torch.set_grad_enabled(call.grad or hooked))
            for device, dtype in call.autocast:
                around.enter_context(torch.autocast(device, dtype))
            if call.state is not None:
                around.enter_context(draws_from(call.state))
            result = call.function(*args, **kwargs)
        if call.tells:
            self._tell(call, result)
        self._bind(call.result, result)

    def _cut(self, _: pytree.Path, leaf: Any) -> Any:
        if isinstance(leaf, slice):
            return slice(
                *(
                    self.lengths.get(part, part) if type(part) is int else part
                    for part in (leaf.start, leaf.stop, leaf.step)
                )
            )
        return self.lengths.get(leaf, leaf) if type(leaf) is int else leaf

    def _tell(self, call: Call, result: Any) -> None:
        number = len(self.told)
        before = self.base[number].value if number < len(self.base) else result
        self.told.append(Told(call.place, result, before))
        if isinstance(result, bool) and result != before:
            raise DecidesError(f"it decides by the values of the batch ({line_of(call.place)})")

    def _bind(self, old: Any, new: Any) -> None:
        if isinstance(old, torch.Tensor) or (
            isinstance(old, (np.ndarray, list)) and type(old) is type(new) and not pytree.tensors(old)
        ):
            self.values[id(old)] = new
        else:
            for (_, a), (_, b) in zip(pytree.leaves(old), pytree.leaves(new), strict=False):
                if isinstance(a, torch.Tensor):
                    self.values[id(a)] = b

    def _model(self, call: ModelCall) -> None:
        arguments = self.swapped((call.args, call.kwargs))
        self._place(call, arguments)
        dims = dict(call.layout.output) if call.layout is not None else {}
        carrying = {id(o.tensor): o.dim for o in call.outputs}
        leaves = []
        for path, t in pytree.leaves(call.result):
            if not isinstance(t, torch.Tensor):
                continue
            value = self.kept.get(id(t), t).detach()
            dim = carrying.get(id(t), dims.get(path))
            if dim is not None and self.exchange is not None and call.samples == self.step.samples:
                rows = Rows.of(dim, self.step.samples)
                value = rows.exchange(value, self.placement.rows) if self.placement else self.exchange.rows(value, rows)
            if id(t) in carrying:
                leaf = value.clone().requires_grad_()
                leaves.append(leaf)
                value = leaf
            self.values[id(t)] = value.clone()  # the loop may write into it
        if call in self.step.calls:
            if self.kept:  # the loop may write into them later
                arguments = pytree.map_leaves(lambda _, t: t.clone() if isinstance(t, torch.Tensor) else t, arguments)
            self.arguments.append(arguments)
            self.leaves.append(leaves)

    def _place(self, call: ModelCall, arguments: Any) -> None:
        number = len(self.arguments)
        if (
            self.exchange is None
            or call.layout is None
            or call not in self.step.calls
            or number >= len(self.base_arguments)
        ):
            return
        base = self.base_arguments[number]
        self.placement = placement(base, arguments, call.layout, self.step.samples, self.exchange) or self.placement

    def swapped(self, tree: Any) -> Any:
        """Arguments with the values of this repetition."""
        key = id(tree)
        if key in self.values:
            return self.values[key]
        if isinstance(tree, (torch.Tensor, np.ndarray)) or self.sources.of(tree) is not None:
            self.values[key] = value = self._first_value(tree)
            return value
        if isinstance(tree, slice):
            return slice(*(self.swapped(part) for part in (tree.start, tree.stop, tree.step)))
        if isinstance(tree, (int, float, str, type(None))):
            return tree
        if type(tree) is list and (column := self._column(tree)) is not None:
            return column
        return pytree.map_children(lambda _, part: self.swapped(part), tree)

    def _first_value(self, thing: Any) -> Any:
        source = self.sources.of(thing)
        value = self.kept.get(id(thing), thing)
        if isinstance(thing, torch.Tensor) and id(thing) not in self.kept and comes_from(thing, self.step.calls):
            raise NotFollowedError(
                "it takes a tensor that comes from the model by a way that torch functions do not show (a compiled function, a "
                "custom autograd.Function)"
            )
        if source is not None:
            if self.exchange is not None and source.delivery in self.step.deliveries:
                value = source.exchanged(self.exchange, value)
        elif id(thing) in self.guessed and self.exchange is not None:
            value = self.exchange.rows(value, Rows.of(self.guessed[id(thing)], self.step.samples))
        if isinstance(thing, torch.Tensor) and id(thing) in self.kept:
            return value.detach().clone()
        return value

    def _column(self, numbers: list[Any]) -> list[Any] | None:
        """A list that holds one number of every sample, with the samples exchanged."""
        if self.exchange is None or self.exchange.extreme is not None or len(numbers) != self.step.samples:
            return None
        if not all(isinstance(number, (bool, int, float)) for number in numbers):
            return None
        if self.columns is None:
            lists = [s for s in self.sources.values() if s.entries and s.delivery in self.step.deliveries]
            self.columns = [c for s in lists for c in _columns(s, self.exchange)]
        return next((new for old, new in self.columns if old == numbers), None)

    def finish(self) -> _Ran:
        for source in self.sources.values():
            if source.entries and source.delivery in self.step.deliveries:
                entries = source.held()
                other = entries if self.exchange is None else source.exchanged(self.exchange, entries)
                for old, new in zip(numbers_in(entries), numbers_in(other), strict=True):
                    self.told.append(Told(None, new, old))
        for delivery in self.step.deliveries:
            numbers = [n for n in delivery.of_all if isinstance(n, (int, float))]
            self.told += [Told(None, n if self.exchange is None else with_other_samples(n), n) for n in numbers]
        loss = self.values[id(self.step.loss)]
        outer = self.step.outer
        total = loss.sum() if outer is None else (loss * outer).sum()
        if not total.requires_grad:
            raise NotFollowedError("the loss does not depend on the model's outputs by torch functions")
        flat = [leaf for leaves in self.leaves for leaf in leaves]
        found = torch.autograd.grad(total, flat, allow_unused=True)
        grads = iter([torch.zeros_like(leaf) if g is None else g for leaf, g in zip(flat, found, strict=True)])
        gradients = [[next(grads) for _ in leaves] for leaves in self.leaves]
        return _Ran(Repeated(self.arguments, gradients, self.placement), self.told)


def _by_a_backward_hook(result: Any) -> bool:
    """Whether a tensor is another one only so that its gradient is seen, by a hook of a module or behind a no-grad region."""
    kind = type(result.grad_fn).__name__ if isinstance(result, torch.Tensor) else ""
    return "BackwardHookFunction" in kind or "_Tripwire" in kind


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _columns(source: Source, exchange: Exchange) -> list[tuple[list[Any], list[Any]]]:
    entries = source.held()
    places = [path for path, leaf in pytree.leaves(entries[0]) if isinstance(leaf, (int, float))] if entries else []
    out = []
    for place in places:
        column = [dict(pytree.leaves(entry)).get(place) for entry in entries]
        out.append((column, [column[i] for i in exchange.order]))
    return out


def path_to(loss: torch.Tensor, calls: Sequence[Call | ModelCall]) -> tuple[list[Call | ModelCall], set[int]]:
    """The calls that a loss is made of, and those that made Python values of a tensor's values.

    Args:
        loss: the loss.
        calls: everything that was written down.

    Returns:
        Both in order, and the numbers of the latter.
    """
    wanted, aside = {id(loss)}, set[int]()
    storages = {storage_of(loss)}
    path: list[Call | ModelCall] = []
    marks: list[bool] = []
    for call in reversed(calls):
        made = {id(t) for t in pytree.tensors(call.result)} | {id(call.result)}
        needed = bool(made & wanted)
        if isinstance(call, Call) and writes(call.name, call.kwargs) and not needed:
            needed = any(storage_of(t) in storages for t in pytree.tensors((call.args[:1], call.kwargs.get("out"))))
        asked = isinstance(call, Call) and call.tells and bool(pytree.tensors((call.args, call.kwargs)))
        if not needed and not asked and not made & aside:
            continue
        parts = {id(p) for p in parts_of((call.args, call.kwargs)) if isinstance(p, (torch.Tensor, np.ndarray, list))}
        if needed:
            wanted |= parts
            storages |= {storage_of(t) for t in pytree.tensors((call.args, call.kwargs))}
        else:
            aside |= parts
        path.append(call)
        marks.append(not needed)
    path.reverse()
    marks.reverse()
    return path, {number for number, mark in enumerate(marks) if mark}

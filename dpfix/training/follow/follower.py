"""Writing down what the script does with a delivered batch, up to ``loss.backward()``."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any
from weakref import ref

import numpy as np
import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.hooks import RemovableHandle

from dpfix.errors import MisuseError
from dpfix.instrument import pytree
from dpfix.instrument.function_modes import FollowingMode, reads_gradient, switch_off, switch_on
from dpfix.instrument.sharded import is_sharded
from dpfix.layout.calls import CallLayout, find_layout, samples_in
from dpfix.training.follow.after_step import AfterStep
from dpfix.training.follow.calls import (
    ARITHMETIC,
    GIVES_MEMORY,
    LENGTHS,
    LIKE,
    MAKES,
    RANDOM,
    TELL_NOTHING,
    Call,
    ModelCall,
    Output,
    autocast_regions,
    graph_edges,
    overwrites,
    parts_of,
    selects,
    users_place,
    writes,
)
from dpfix.training.follow.delivery import BatchLayout, Delivery, Source
from dpfix.training.follow.hook import Hook
from dpfix.training.follow.kept import Kept
from dpfix.training.follow.outside import refuse_write
from dpfix.training.follow.under_way import MOST_AHEAD, Origins, UnderWay, origin_of

MOST_CALLS = 20_000
"""Functions between a delivery and ``backward()``; what is more is a loop that never calls it."""
MOST_BYTES = 2**31
"""Results of these functions, which are held until then."""


class Follower(FollowingMode):
    """Writes down every torch function that the script calls between a delivery and ``backward()``, outside the model.

    Args:
        module: the private model.
        layouts: how its calls carry the samples.
        batches: how the loader's batches do.
        on_backward: called with the tensor on which ``backward`` is called, and the arguments of ``backward``.

    Attributes:
        calls: what was called, in order.
        sources: parts of delivered batches, by identity.
        kept: values of tensors before the script wrote into them, by identity.
        plain: tensors that were made of nothing of the batch, by identity.
        seen: what this step did, as far as it tells steps of different kinds apart.
        unknown_form: whether the last batch did not look like those of this loader.
        broken: why the calls have a gap; empty if they have none.
        earlier: what the script may have kept of earlier batches.
        over: whether it is to be taken off.
        on_draw: called with the draw that the model is called with, where several are under way.
        on_gradient: called with a tensor whose ``grad`` is read between ``backward()`` and ``step()``, and the frame that does.
    """

    def __init__(
        self,
        module: nn.Module,
        layouts: tuple[CallLayout, ...],
        batches: BatchLayout,
        on_backward: Callable[[torch.Tensor, Any, Any], None],
    ) -> None:
        super().__init__()
        self.paused, self.over = True, True
        self.on_draw: Callable[[Any], None] = lambda draw: None
        self.on_gradient: Callable[[torch.Tensor, FrameType], None] = lambda p, frame: None
        self._on_cuda = any(p.is_cuda for p in module.parameters())
        self.deliveries = UnderWay(batches)
        self.sources = self.deliveries.sources
        self.unknown_form = False
        self._marks: list[tuple[Delivery, int]] = []
        self.earlier, self._after_step = Kept(), AfterStep(self)
        self.thread = threading.get_ident()
        self._state: Any = None
        self._was_on = self._resting = False
        self.clear()
        self._module, self._hooks = module, list[RemovableHandle]()
        self.follow(layouts, on_backward)

    def follow(self, layouts: tuple[CallLayout, ...], on_backward: Callable[[torch.Tensor, Any, Any], None]) -> None:
        """Follow the model; the arguments are those of the class."""
        self._layouts, self._on_backward = layouts, on_backward
        self._hooks += [
            self._module.register_forward_pre_hook(Hook(self._enter), prepend=True, with_kwargs=True),
            self._module.register_forward_hook(Hook(self._leave), with_kwargs=True, always_call=True),
        ]
        if self._resting:
            self._resting = False
            self.resume()

    def rest(self) -> None:
        """Take it off the model and off the functions until :meth:`follow`; what was written down stays."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._resting = not self.over
        self._after_step.end()
        switch_off(self)

    def remove(self) -> None:
        """Take everything off; the training is over."""
        self.rest()
        self.clear()
        for known in (self.deliveries, self.sources, self.earlier):
            known.clear()

    def clear(self) -> None:
        """Forget the calls."""
        self.calls: list[Call | ModelCall] = []
        self._models: list[ModelCall] = []
        self.kept: dict[int, torch.Tensor] = {}
        self.seen: set[Any] = set()
        self.broken, self._marks, self._after_backward = "", [], False
        self.plain: dict[int, ref[torch.Tensor]] = {}
        self._read, self._gave_array = False, False  # whether the script has made Python values, or arrays, of a batch
        self._data_shaped: set[int] = set()  # tensors whose length depends on what a batch holds; the calls hold them
        self._taken: set[int] = set()  # what was made of delivered batches or by the model; the calls hold it
        self._held = 0

    # -------------------------------------------------------------- deliveries

    def deliver(self, batch: Any, draw: Any = None) -> None:
        """The private loader hands out a batch.

        Args:
            draw: the ledger's draw of it.
        """
        self._drop_old()
        delivery = self.deliveries.add(batch, draw)
        self.unknown_form = delivery is None
        if delivery is not None:
            sources = self.deliveries[delivery]
            self._forget_collation(sources)
            self.earlier.drop(sources)
            self._marks.append((delivery, len(self.calls)))
        self.resume()

    def forget_deliveries(self) -> None:
        """What the model is called with are not the samples that were delivered."""
        self.deliveries.drop(self.deliveries)
        for model in self._models:
            model.deliveries.clear()

    def _forget_collation(self, sources: dict[int, Source]) -> None:
        """A batch is what was delivered; how a loader in the script's thread has made it, while it is followed, is not."""
        last = self._marks[-1][1] if self._marks else 0
        self.calls[last:] = [c for c in self.calls[last:] if id(c.result) not in sources]

    def resume(self) -> None:
        """What follows is written down, in the thread that calls the model."""
        if threading.get_ident() == self.thread:
            self._after_step.end()
            switch_on(self)
            self.paused = False

    def pause(self) -> None:
        """What follows is nobody's business; while it is off, functions cost nothing."""
        switch_off(self)

    def _drop_old(self) -> None:
        self.deliveries.drop_old()
        if len(self._marks) > MOST_AHEAD:
            first = self._marks[-MOST_AHEAD][1]
            del self.calls[:first]
            self._marks = [(d, at - first) for d, at in self._marks[-MOST_AHEAD:]]

    def settle(self, *, remember: bool = False) -> None:
        """A step was made: forget its deliveries, and everything that was made of them alone.

        Args:
            remember: whether to recognise later what the script keeps of it.
        """
        used = set().union(*(c.deliveries for c in self.calls if isinstance(c, ModelCall)))
        waiting = {d for d in self.deliveries if d not in used} if used or len(self.deliveries) > 1 else set()
        origin = self.origins() if waiting or remember else {}
        self.earlier.tidy()
        left = []
        for call in self.calls:
            if waiting and origin_of((call.args, call.kwargs), origin) & waiting:
                left.append(call)
            elif remember:
                self._remember(call, origin)
        done = [d for d in self.deliveries if d not in waiting]
        if remember:
            self.earlier.add(source.held() for d in done for source in self.deliveries[d].values())
        self.deliveries.drop(done)
        self.clear()
        self.calls = left
        for call in left:
            self._take((call.result, call.args[:1]) if overwrites(call) else call.result)
        if waiting:
            return self.resume()
        switch_off(self)
        if remember:
            self._after_step.begin()

    def _remember(self, call: Call | ModelCall, origin: Origins) -> None:
        """What a call has made of a delivered batch may be kept by the script; then it is known where it came from."""
        made = pytree.tensors((call.result, call.args[:1])) if overwrites(call) else pytree.tensors(call.result)
        unknown = isinstance(call, ModelCall) and not self.sources
        of_model = isinstance(call, ModelCall) or self.earlier.of_model((call.args, call.kwargs))
        self.earlier.add((t for t in made if origin.get(id(t)) or unknown), of_model=of_model)

    # -------------------------------------------------------------- the model

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._given = (args, kwargs) if is_sharded(module) else None
        self._was_on = not self.over
        switch_off(self)
        self._after_step.pause()
        self._state = torch.get_rng_state(), torch.cuda.get_rng_state() if self._on_cuda else None

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.thread = threading.get_ident()
        if output is None:  # it failed
            if self._was_on:
                self.resume()
            return self._after_step.resume()
        (args, kwargs), self._given = self._given or (args, kwargs), None  # FSDP's own hooks turn and move them
        grad = torch.is_grad_enabled() and bool(pytree.gradient_tensors(output))
        if not grad and not self._was_on:  # an evaluation, of which nothing is held
            self.earlier.add(pytree.tensors(output) if self.earlier.among((args, kwargs)) else (), of_model=True)
            self._after_step.resume()
            return
        layout = find_layout(self._layouts, args, kwargs)
        samples = 0
        if layout is not None:
            with suppress(MisuseError):  # an evaluation on anything else; in training, the engine says so
                samples = samples_in(layout, module, args, kwargs)
        call = ModelCall(args, kwargs, output, layout, samples, self._state)
        call.deliveries, call.autocast = self.deliveries_in(args, kwargs), autocast_regions(module)
        self._take(output)
        if grad:
            if len(self.deliveries) > 1 and len(call.deliveries) == 1:
                self.on_draw(next(iter(call.deliveries)).draw)
            dims = {} if layout is None else dict(layout.output)
            for path, t in pytree.leaves(output):
                if isinstance(t, torch.Tensor) and t.requires_grad:
                    call.outputs.append(Output(t, get_gradient_edge(t), dims.get(path), t._version))
            self.seen |= graph_edges([o.edge.node for o in call.outputs])
        self.calls.append(call)
        self._models.append(call)
        self.resume()

    def deliveries_in(self, args: Any, kwargs: Any) -> set[Delivery]:
        """The deliveries that the arguments of a call come from, as far as that is known."""
        if len(self.deliveries) < 2:
            return set(self.deliveries) if self._takes(args, kwargs) else set()
        return origin_of((args, kwargs), self.origins())

    # -------------------------------------------------------------- functions

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused or threading.get_ident() != self.thread or torch.compiler.is_compiling():
            return func(*args, **kwargs)
        if func is torch.Tensor.backward:
            self.paused = True
            try:
                self.at_backward(args[0], args[1:], kwargs)
                return func(*args, **kwargs)
            finally:
                self.paused = self.over
        if self._after_backward and reads_gradient(func):
            self.on_gradient(args[0], sys._getframe(2))  # that of the mode which lies for it is between
        return self._note(func, args, kwargs, sys._getframe(2))

    def at_backward(self, loss: torch.Tensor, args: Any, kwargs: Any) -> None:
        """``loss.backward(...)`` is about to be called."""
        self._on_backward(loss, args, kwargs)
        self._after_backward = True

    def note(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call a function and write it down as one step, whatever it calls in turn.

        Returns:
            What it returns.
        """
        return self._note(func, args, kwargs, sys._getframe(1))

    def _note(self, func: Callable[..., Any], args: Any, kwargs: Any, frame: FrameType | None) -> Any:
        name = getattr(func, "__name__", "")
        given = args[:1] if name == "__deepcopy__" else args  # its memo may hold objects that are half made
        if not (self._takes(given, kwargs) or (name in MAKES and (self.deliveries.layout.lists or self._read))):
            result, earlier = self.beside(func, args, kwargs, frame)
            if isinstance(result, torch.Tensor) and not earlier:
                if name in MAKES and args and type(args[0]) in (bool, int, float):  # a switch
                    self.seen.add((users_place(frame), name, not args[0]))
                if not self._gave_array or all(map(self.is_plain, pytree.tensors((given, kwargs)))):
                    self.plain[id(result)] = ref(result)  # no array of the batch can be in it
            return result
        if writes(name, kwargs):
            if not self._takes(args[:1], {}):
                refuse_write(self._module, args, kwargs, frame)
            self._keep(args, kwargs)
        elif name in GIVES_MEMORY:
            self._keep(args, {})
        state = torch.get_rng_state() if name in RANDOM else None
        self.paused = True
        try:
            result = func(*args, **kwargs)
        finally:
            self.paused = False
        if name in TELL_NOTHING and not isinstance(result, torch.Tensor):
            if name not in LENGTHS or not isinstance(result, (int, tuple)) or id(args[0]) not in self._data_shaped:
                return result
        elif selects(name, args):
            self._data_shaped |= {id(t) for t in pytree.tensors(result)}
        self._read |= not isinstance(result, torch.Tensor)
        self._gave_array |= isinstance(result, (np.ndarray, list))
        place = users_place(frame)
        grad = torch.is_grad_enabled()
        version = result._version if isinstance(result, torch.Tensor) else 0
        self.calls.append(Call(func, name, args, kwargs, result, place, grad, state, autocast_regions(), version))
        self._take(result)
        if writes(name, kwargs):
            self._take((args[:1], kwargs.get("out")))
        zeros = tuple(a == 0 for a in args if type(a) in (int, float)) if name in ARITHMETIC else ()
        self.seen.add((place, name, zeros))
        if len(self.calls) >= MOST_CALLS or self._held > MOST_BYTES:
            self.clear()
            self.broken = (
                f"backward() was not called within {MOST_CALLS} functions or {MOST_BYTES >> 30} GiB of results"
            )
            self.paused = True
        return result

    def beside(self, func: Any, args: Any, kwargs: Any, frame: FrameType | None) -> tuple[Any, bool]:
        """Call a function that takes nothing of this step's batch.

        Returns:
            What it returns, and whether anything of an earlier batch is in it.
        """
        name = getattr(func, "__name__", "")
        given = args[:1] if name == "__deepcopy__" else args
        earlier, written = name not in LIKE and self.earlier.among((given, kwargs)), writes(name, kwargs)
        if earlier and written:
            refuse_write(self._module, args, kwargs, frame)
        result = func(*args, **kwargs)
        if earlier:
            made = pytree.tensors((result, args[:1], kwargs.get("out")) if written else result)
            self.earlier.add(made, of_model=self.earlier.of_model((given, kwargs)))
        return result, earlier

    def is_plain(self, t: torch.Tensor) -> bool:
        """Whether a tensor was made, while it was followed, of nothing that comes from the batch."""
        held = self.plain.get(id(t))
        return held is not None and held() is t

    def _takes(self, args: Any, kwargs: Any) -> bool:
        """Whether a function takes anything that comes from a delivered batch or from the model."""
        known, taken = self.sources, self._taken
        for part in args if not kwargs else (*args, *kwargs.values()):
            for p in parts_of(part) if isinstance(part, (list, tuple, dict)) else (part,):
                if id(p) in taken or (id(p) in known and known.of(p) is not None):
                    return True
        return False

    def _take(self, made: Any) -> None:
        for part in parts_of(made):
            if isinstance(part, torch.Tensor):
                self._held += part.nbytes if part.layout is torch.strided else 0
            elif not isinstance(part, (np.ndarray, list)):
                continue
            self._taken.add(id(part))

    def _keep(self, args: Any, kwargs: Any) -> None:
        """Values that are about to be overwritten; what was made while it is followed can be made again."""
        for t in pytree.tensors((args[:1], kwargs.get("out"))):
            if id(t) not in self.kept:
                self.kept[id(t)] = t.detach().clone()
            for call in self._models:
                call.keep(t)

    def origins(self) -> Origins:
        """For every tensor that comes from delivered batches, these deliveries."""
        return self.deliveries.origins(self.calls)

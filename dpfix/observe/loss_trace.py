"""Writing down what the loop computes between the model's output and ``loss.backward()``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode

from dpfix.instrument import pytree
from dpfix.instrument.function_modes import FollowingMode
from dpfix.layout.calls import CallLayout
from dpfix.layout.sample_dim import SampleDim

_SETTINGS = ("weight", "pos_weight")  # class weights: a setting of the loss even where their length is the batch's

MOST_CALLS = 20_000
"""Functions between an output and ``backward()``; what is more is a loop that never calls it."""


@dataclass(frozen=True)
class Entry:
    """One function call on the way to the loss.

    Attributes:
        function: the function.
        args: its positional arguments.
        kwargs: its keyword arguments.
        result: what it returned.
    """

    function: Callable[..., Any]
    args: Any
    kwargs: Any
    result: Any


@dataclass(frozen=True)
class Output:
    """A tensor that the model returned.

    Attributes:
        tensor: the tensor.
        values: its values at that moment.
        dim: how it carries the samples.
        version: how often it had been written to.
    """

    tensor: torch.Tensor
    values: torch.Tensor
    dim: SampleDim
    version: int


class LossTrace(FollowingMode):
    """Writes down every function from the model's outputs to the loss.

    Args:
        on_backward: called with the tensor on which ``backward`` is called, and the arguments of ``backward``.

    Attributes:
        paused: whether nothing is written down now.
        entries: the function calls, in order.
        outputs: the model's outputs, by the id of the tensor.
        constants: values of everything else that the functions took (targets, masks, class weights), by id.
        settings: ids of the constants that are settings of the loss.
        known: tensors that the functions made, by id.
        samples: numbers of samples in the calls of the model.
        broken: why the way to the loss has a gap; empty if it has none.
        over: whether it is to be taken off.
    """

    def __init__(self, on_backward: Callable[[torch.Tensor, Any], None]) -> None:
        super().__init__()
        self.paused, self.over = True, False
        self._on_backward = on_backward
        self.clear()

    def clear(self) -> None:
        """Forget what was written down."""
        self.entries: list[Entry] = []
        self.outputs: dict[int, Output] = {}
        self.constants: dict[int, torch.Tensor] = {}
        self.settings: set[int] = set()
        self._held: list[torch.Tensor] = []  # the constants themselves; the ids are theirs
        self.known: dict[int, torch.Tensor] = {}
        self.samples: set[int] = set()
        self.broken = ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        if func is torch.Tensor.backward:
            self.paused = True
            self._on_backward(args[0], (args[1:], kwargs))
            return func(*args, **kwargs)
        return self.note(func, args, kwargs)

    def note(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call a function and write it down as one step, whatever it calls in turn.

        Returns:
            What it returns.
        """
        if len(self.entries) >= MOST_CALLS:
            self.clear()
            self.gap(f"backward() was not called within {MOST_CALLS} functions")
            self.paused = True
            return func(*args, **kwargs)
        for name, value in kwargs.items():
            if name in _SETTINGS and isinstance(value, torch.Tensor):
                self.settings.add(id(value))
        paused, self.paused = self.paused, True
        try:
            for t in pytree.tensors((args, kwargs)):
                self._meet(t, func)
            result = func(*args, **kwargs)
            self.entries.append(Entry(func, args, kwargs, result))
            for t in pytree.tensors(result):
                self.known[id(t)] = t
        finally:
            self.paused = paused
        return result

    def _meet(self, t: torch.Tensor, func: Callable[..., Any]) -> None:
        if id(t) in self.known or id(t) in self.outputs or id(t) in self.constants:
            return
        if t.grad_fn is not None:
            self.gap(
                f"{getattr(func, '__name__', func)} takes a tensor that comes from the model by a way that torch functions do "
                "not show (a compiled function, a custom autograd.Function)"
            )
        self._held.append(t)
        self.constants[id(t)] = _values(t)

    def gap(self, why: str) -> None:
        """The way to the loss cannot be followed.

        Args:
            why: the reason; the first one is kept.
        """
        self.broken = self.broken or why

    def start(self, output: Any, layout: CallLayout, samples: int) -> None:
        """The model has returned: what follows is on the way to the loss."""
        dims = dict(layout.output)
        for path, t in pytree.leaves(output):
            if isinstance(t, torch.Tensor) and t.requires_grad:
                dim = dims.get(path)
                if dim is None:
                    self.gap("an output of the model does not show which rows belong to which sample")
                else:
                    self.outputs[id(t)] = Output(t, _values(t), dim, t._version)
        self.samples.add(samples)


def _values(t: torch.Tensor) -> torch.Tensor:
    """Its values as they are now: the loop may write into it later."""
    return t.detach().as_subclass(torch.Tensor).clone()


def is_on(trace: LossTrace) -> bool:
    """Whether a trace is among the function modes that are on."""
    return any(mode is trace for mode in _get_current_function_mode_stack())


def switch_off(trace: LossTrace) -> None:
    """Take a trace off. While it handles a function itself that is put off until the next trace is switched on or off."""
    trace.paused = trace.over = True
    _sweep()


def switch_on(trace: LossTrace) -> None:
    """Let a trace see the functions that are called from now on."""
    trace.over = False
    _sweep()
    if not is_on(trace):
        trace.__enter__()


def switch_off_all() -> None:
    """Take every trace off: a new private training begins, and steps of earlier ones are not going to be finished."""
    for mode in _get_current_function_mode_stack():
        if isinstance(mode, LossTrace):
            mode.clear()
            switch_off(mode)


def _sweep() -> None:
    """Take off the traces that are over, wherever they lie; the script's own modes keep their order."""
    stack = _get_current_function_mode_stack()
    over = [number for number, mode in enumerate(stack) if isinstance(mode, LossTrace) and mode.over]
    if not over:
        return
    above = stack[over[0] :]
    for _ in above:
        _pop_mode()
    for mode in above:
        if not (isinstance(mode, LossTrace) and mode.over):
            _push_mode(mode)

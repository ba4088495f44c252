"""Functions of tensors that are followed as one step by whoever writes down what is computed."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet, ref

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils._device import DeviceContext


class FollowingMode(ABC):
    """Writes down torch functions.

    Attributes:
        paused: whether nothing is written down now.
        over: whether it is to be taken off.
        thread: the one in which it follows.
        on_abandoned: called when the step that it follows is not going to be finished.
    """

    paused, over, thread = False, True, 0

    def __init__(self) -> None:
        ALIVE.add(self)
        self.on_abandoned: Callable[[], None] = lambda: None

    @abstractmethod
    def clear(self) -> None:
        """Forget what was written down."""

    @abstractmethod
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As that of torch's function modes."""

    @abstractmethod
    def note(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call a function and write it down as one step, whatever it calls in turn.

        Returns:
            What it returns.
        """


ALIVE: WeakSet[FollowingMode] = WeakSet()
"""Those of all trainings that are alive. A training begins, and they are looked through, in one thread at a time (``TURN``)."""


@contextmanager
def unfollowed() -> Iterator[None]:
    """What is called inside is nobody's business.

    Yields:
        Nothing.
    """
    modes = [m for m in following() if not m.paused]
    for mode in modes:
        mode.paused = True
    try:
        yield
    finally:
        for mode in modes:
            mode.paused = False


def as_one(func: Callable[..., Any], *args: Any) -> Any:
    """Call a function that is to be followed as one step: what happens inside it (vmap) cannot be repeated piece by piece.

    Returns:
        What it returns.
    """
    for mode in reversed(following()):
        if not mode.paused:
            return mode.note(func, args, {})
    return func(*args)


def reads_gradient(func: Any) -> bool:
    """Whether a function that a mode sees is the reading of a tensor's ``grad``."""
    return getattr(func, "__self__", None) is torch.Tensor.grad and func.__name__ == "__get__"


class Laid(TorchFunctionMode):
    """Lies among torch's function modes for one that follows, and does not keep it alive: nor the batch that it holds."""

    def __init__(self, mode: FollowingMode) -> None:
        super().__init__()
        self.mode = ref(mode)

    @property
    def over(self) -> bool:
        """Whether it is to be taken off."""
        mode = self.mode()
        return mode is None or mode.over

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        mode = self.mode()
        return func(*args, **(kwargs or {})) if mode is None else mode.__torch_function__(func, types, args, kwargs)


def following() -> list[FollowingMode]:
    """Those that are on in this thread, the last one first asked."""
    laid = (mode.mode() for mode in _get_current_function_mode_stack() if isinstance(mode, Laid))
    return [mode for mode in laid if mode is not None]


def switch_off(mode: FollowingMode) -> None:
    """Take it off. While it handles a function itself that is put off until the next one is switched on or off."""
    mode.paused = mode.over = True
    _sweep()


def switch_on(mode: FollowingMode) -> None:
    """Let it see the functions that are called from now on in this thread.

    It goes below the script's own modes: a ``with`` block that is open takes off what lies on top when it ends. Only
    ``torch.set_default_device`` looks for its mode at the bottom.
    """
    mode.over = False
    _sweep()
    if not any(other is mode for other in following()):
        stack = _get_current_function_mode_stack()
        height = int(bool(stack) and isinstance(stack[0], DeviceContext) and "old_device" in vars(stack[0]))
        _lay(height, [Laid(mode), *stack[height:]])


def switch_off_all() -> None:
    """Take all of this thread off: a new private training begins, and steps of earlier ones are not going to be finished.

    What they hold of a batch keeps the earlier trainings alive, as nothing collects a cycle through the graph of a loss.
    """
    for mode in [mode for mode in ALIVE if mode.thread == threading.get_ident()]:
        mode.clear()
        mode.on_abandoned()
        switch_off(mode)


def _sweep() -> None:
    """Take off those that are over, wherever they lie; the script's own modes keep their order."""
    stack = _get_current_function_mode_stack()
    if stack and isinstance(stack[-1], Laid) and stack[-1].over:
        _pop_mode()
        stack.pop()
    over = [number for number, mode in enumerate(stack) if isinstance(mode, Laid) and mode.over]
    if over:
        _lay(over[0], [m for m in stack[over[0] :] if not (isinstance(m, Laid) and m.over)])


def _lay(height: int, modes: list[TorchFunctionMode]) -> None:
    """Put modes where others lie from some height on."""
    for _ in _get_current_function_mode_stack()[height:]:
        _pop_mode()
    for mode in modes:
        _push_mode(mode)

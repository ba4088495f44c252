"""Functions of tensors that are followed as one step by whoever writes down what is computed."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack


class FollowingMode(TorchFunctionMode):
    """Writes down torch functions.

    Attributes:
        paused: whether nothing is written down now.
    """

    paused = False

    @abstractmethod
    def note(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call a function and write it down as one step, whatever it calls in turn.

        Returns:
            What it returns.
        """


@contextmanager
def unfollowed() -> Iterator[None]:
    """What is called inside is nobody's business.

    Yields:
        Nothing.
    """
    modes = [m for m in _get_current_function_mode_stack() if isinstance(m, FollowingMode) and not m.paused]
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
    for mode in reversed(_get_current_function_mode_stack()):
        if isinstance(mode, FollowingMode) and not mode.paused:
            return mode.note(func, args, {})
    return func(*args)

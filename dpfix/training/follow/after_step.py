"""After a step, until the next batch: what the script makes of what it has kept of the last one."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from typing_extensions import override

from dpfix.instrument.function_modes import FollowingMode, switch_off, switch_on

if TYPE_CHECKING:
    from dpfix.training.follow.follower import Follower

MOST_AFTER = 10_000
"""Functions after a step that are looked at."""


class AfterStep(FollowingMode):
    """Stands in for the follower between a step and the next delivery, and ends by itself.

    Args:
        follower: knows what is of earlier batches.
    """

    def __init__(self, follower: Follower) -> None:
        super().__init__()
        self._follower = follower
        self._left, self.thread = 0, 0

    @property
    def going_on(self) -> bool:
        """Whether functions are still looked at, though perhaps not while the model runs."""
        return self._left > 0

    def begin(self) -> None:
        """A step was made."""
        self._left, self.thread = MOST_AFTER, threading.get_ident()
        self.resume()

    def resume(self) -> None:
        """Go on after the model has run."""
        if self.going_on:
            switch_on(self)
            self.paused = False

    def pause(self) -> None:
        """The model runs."""
        switch_off(self)

    def end(self) -> None:
        """The next batch is here, or the training is over."""
        self.clear()
        switch_off(self)

    @override
    def clear(self) -> None:
        self._left = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.note(func, args, kwargs or {})

    def note(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call a function, whatever it calls in turn.

        Returns:
            What it returns.
        """
        follower = self._follower
        if self.paused or threading.get_ident() != self.thread or torch.compiler.is_compiling():
            return func(*args, **kwargs)
        self._left -= 1
        self.paused, frame = True, sys._getframe(2)
        try:
            if func is not torch.Tensor.backward:
                return follower.beside(func, args, kwargs, frame)[0]
            follower.at_backward(args[0], args[1:], kwargs)
            return func(*args, **kwargs)
        finally:
            self.paused = self.over = self.over or not self._left

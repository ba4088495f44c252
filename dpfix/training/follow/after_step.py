"""What the loop does with a batch after the private step: losses of other models on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from typing_extensions import override

from dpfix.instrument.function_modes import FollowingMode, switch_off, switch_on

if TYPE_CHECKING:
    from dpfix.training.follow.follower import Follower


class AfterStep(FollowingMode):
    """Sees nothing but calls of ``backward()``, from a checked step to the next delivery; keeps nothing alive.

    Args:
        follower: is told of them.
    """

    def __init__(self, follower: Follower) -> None:
        super().__init__()
        self.paused = self.over = True
        self._follower = ref(follower)

    def begin(self) -> None:
        """A step was made."""
        switch_on(self)
        self.paused = False

    @override
    def note(self, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.Tensor.backward or self.paused:
            return func(*args, **kwargs)
        follower = self._follower()
        if follower is None:
            switch_off(self)
            return func(*args, **kwargs)
        self.paused = True
        try:
            follower.on_loss(args[0], args[1:], kwargs)
            return func(*args, **kwargs)
        finally:
            self.paused = self.over

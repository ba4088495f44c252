"""A hook on the private model that its copies do not have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakMethod

import torch


class Hook:
    """A hook that does nothing in a copy of the model, or a pickled one: only the model itself is followed.

    Args:
        act: a method; its object is not kept alive, since the graph of a batch that it holds can lead back to the model.
    """

    def __init__(self, act: Callable[..., None] | None = None) -> None:
        self._act: Any = None if act is None else WeakMethod(act)

    def __call__(self, *args: Any) -> None:
        """The model is called, or has returned."""
        if self._act is not None:
            _NOT_COMPILED(self._act, args)

    def __reduce__(self) -> Any:
        return Hook, ()


def _call(method: Any, args: tuple[Any, ...]) -> None:
    act = method()
    if act is not None:
        act(*args)


_NOT_COMPILED: Any = torch.compiler.disable(_call)

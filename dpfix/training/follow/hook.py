"""A hook on the private model that its copies do not have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Hook:
    """A hook that does nothing in a copy of the model, or a pickled one: only the model itself is followed."""

    def __init__(self, act: Callable[..., None] | None = None) -> None:
        self._act: Any = None if act is None else torch.compiler.disable(act)

    def __call__(self, *args: Any) -> None:
        """The model is called, or has returned."""
        if self._act is not None:
            self._act(*args)

    def __reduce__(self) -> Any:
        return Hook, ()

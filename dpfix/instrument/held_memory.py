"""How much memory the tensors of a block hold at once, on any device and without touching the device's own counters."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class HeldMemory(TorchDispatchMode):
    """Watches the tensors that operations make while it is entered; those that were there before are not counted.

    What a library allocates inside one operation, and gives back before it ends, is not seen.

    Attributes:
        most: the largest number of bytes that were held at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.most = self._now = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """The operation itself; what it gets was there before unless it is known."""
        kwargs = kwargs or {}
        for given in tree_leaves((args, kwargs)):
            self._note(given, made=False)
        out = func(*args, **kwargs)
        for made in tree_leaves(out):
            self._note(made, made=True)
        return out

    def _note(self, value: Any, *, made: bool) -> None:
        if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
            return
        storage = value.untyped_storage()
        name = storage._cdata
        if name in self._known:
            return
        held = storage.nbytes() if made else 0
        self._now += held
        self.most = max(self.most, self._now)

        def gone(_: Any) -> None:
            self._now -= held
            self._known.pop(name, None)

        self._known[name] = weakref.ref(storage, gone)

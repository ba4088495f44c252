"""A model that computes in bfloat16 while its parameters, and so their gradients, are in single precision."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TypeVar, cast

import torch
from torch import nn

Function = TypeVar("Function", bound=Callable[..., Any])


class InBFloat16(nn.Module):
    """What a model becomes whose call runs under autocast: a subclass of its own class, with its name.

    A copy or a pickle goes on so.
    """

    original: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, _, *rest = super().__reduce_ex__(protocol)
        return _unpickled, (self.original,), *rest


@functools.cache
def in_bfloat16(original: type[nn.Module]) -> type[nn.Module]:
    """The class that a model gets.

    Args:
        original: its class.

    Returns:
        A subclass of it whose ``forward`` runs under autocast.
    """
    if issubclass(original, InBFloat16):
        return original

    @functools.wraps(original.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device_of(self), torch.bfloat16):
            return original.forward(self, *args, **kwargs)

    names = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(original.__name__, (InBFloat16, original), names | {"original": original, "forward": forward})


def device_of(module: nn.Module) -> str:
    """The kind of device that the parameters of a module are on."""
    return next((p.device.type for p in module.parameters()), "cpu")


def without_autocast(function: Function) -> Function:
    """A function that computes in its arguments' types inside autocast too: sums of products would be rounded there.

    Args:
        function: a function that clips, or makes what is clipped.

    Returns:
        The same, outside of autocast.
    """

    @functools.wraps(function)
    def outside(*args: Any, **kwargs: Any) -> Any:
        on = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
        if not on:
            return function(*args, **kwargs)
        with ExitStack() as around:
            for kind in on:
                around.enter_context(torch.autocast(kind, enabled=False))
            return function(*args, **kwargs)

    return cast("Function", outside)


def _unpickled(original: type[nn.Module]) -> nn.Module:
    cls = in_bfloat16(original)
    return cls.__new__(cls)

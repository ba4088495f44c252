"""Computing in bfloat16 while parameters are in single precision, and computing what must not be rounded so."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from operator import attrgetter
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


@contextmanager
def exact_products() -> Iterator[None]:
    """Products in single precision are not computed in TF32 or bfloat16 inside, whatever the script allows.

    On a GPU torch allows TF32 in convolutions unless it is told otherwise, and every kernel rounds differently then: two ways
    to the same gradient agree in three digits only.

    Yields:
        Nothing.
    """
    if not products_are_rounded():
        yield
        return
    now, older = [kind.fp32_precision for kind in _KINDS], _older_settings()
    if older is None:  # the script uses the newer settings alone, and torch refuses to tell the older ones
        for kind in _KINDS:
            kind.fp32_precision = "ieee"
    else:
        _set_older("highest", False)
    try:
        yield
    finally:
        if older is not None:
            _set_older(*older)
        for kind, value in zip(_KINDS, now, strict=True):
            if kind.fp32_precision != value:
                kind.fp32_precision = value


def products_are_rounded() -> bool:
    """Whether torch may compute products in single precision in TF32 or bfloat16 now."""
    first = 0 if torch.cuda.is_initialized() else len(_ON_CUDA)
    if _KINDS:
        return any(kind.fp32_precision not in ("none", "ieee") for kind in _KINDS[first:])
    return torch.get_float32_matmul_precision() != "highest" or (not first and torch.backends.cudnn.allow_tf32)


def _older_settings() -> tuple[str, bool] | None:
    try:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:
        return None


def _set_older(matmul: str, tf32: bool) -> None:
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = tf32


_ON_CUDA = ("cuda.matmul", "cudnn.conv", "cudnn.rnn")
_PATHS = (*_ON_CUDA, "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn")
# torch before 2.9 has the older settings alone
_KINDS: list[Any] = (
    [attrgetter(path)(torch.backends) for path in _PATHS] if hasattr(torch.backends.cudnn, "conv") else []
)


def _unpickled(original: type[nn.Module]) -> nn.Module:
    cls = in_bfloat16(original)
    return cls.__new__(cls)

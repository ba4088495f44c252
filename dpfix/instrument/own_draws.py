"""Random operations of torch's that draw from a generator of one's own, whatever other threads draw meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

OWN_THREADS = "dpfix"
"""What the names of threads begin with that draw from no generator of torch's own."""


def draws(func: Any) -> bool:
    """Whether an operation draws from torch's generators."""
    return torch.Tag.nondeterministic_seeded in func.tags


def drawn(func: Any, args: Any, kwargs: Any, generator: torch.Generator) -> Any:
    """Call a random operation, which takes from a generator what it would have taken from the global one.

    Args:
        func: an operation of ``torch.ops`` that :func:`draws`.
        args: its arguments.
        kwargs: its further arguments; a generator that is among them is taken.
        generator: on the device of the operation.

    Returns:
        What it gives.
    """
    if func is torch.ops.aten.native_dropout.default:
        return _dropout(*args, generator=generator)
    if _given(func, args, kwargs):
        return func(*args, **kwargs)
    return _taking_generator(func)(*args, **kwargs, generator=generator)


def can_be_drawn(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether :func:`drawn` knows an operation on the CPU; fused attention takes the global generator alone."""
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
    devices = {t.device.type for t in tensors} or {torch.device(kwargs.get("device") or "cpu").type}
    known = func is torch.ops.aten.native_dropout.default or _taking_generator(func) is not None
    return devices == {"cpu"} and known


@contextmanager
def draws_from(state: torch.Tensor) -> Iterator[Callable[[], torch.Tensor]]:
    """Torch's draws on the CPU go on from a state of its generator; those of other threads do not count.

    While there is no other thread, the global generator itself is set.

    Args:
        state: of ``torch.get_rng_state``.

    Yields:
        A function that tells the present state.
    """
    torch.set_rng_state(state)
    if not _other_threads():
        yield torch.get_rng_state
        return
    generator = torch.Generator()
    generator.set_state(state)
    with _OwnDraws(generator):
        yield generator.get_state


def _other_threads() -> bool:
    """Whether there are threads that may draw."""
    me = threading.current_thread()
    return any(thread is not me and not thread.name.startswith(OWN_THREADS) for thread in threading.enumerate())


class _OwnDraws(TorchDispatchMode):
    """Operations of this thread draw from a generator on the CPU."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self._generator = generator

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if draws(func) and can_be_drawn(func, args, kwargs):
            return drawn(func, args, kwargs, self._generator)
        return func(*args, **kwargs)


def _given(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether the script has given a generator."""
    names = [a.name for a in func._schema.arguments]
    return dict(zip(names, args, strict=False), **kwargs).get("generator") is not None


@cache
def _taking_generator(func: Any) -> Any:
    """The operation, or its overload, that takes a generator beside the same arguments; ``None`` if there is none."""
    names = [a.name for a in func._schema.arguments]
    if "generator" in names:
        return func
    overloads = [getattr(func.overloadpacket, name) for name in func.overloadpacket.overloads()]
    wanted = {a.name: str(a.type) for a in func._schema.arguments}
    for other in overloads:
        found = {a.name: str(a.type) for a in other._schema.arguments}
        if found.pop("generator", None) is not None and found == wanted:
            return other
    return None


def _dropout(input: torch.Tensor, p: float, train: bool | None = True, *, generator: torch.Generator) -> Any:
    """``native_dropout`` as torch computes it on the CPU."""
    if train is False:
        return input.clone(), torch.ones_like(input, dtype=torch.bool)
    mask = torch.empty_like(input, dtype=torch.bool).bernoulli_(1 - p, generator=generator)
    return input * mask * (0.0 if p == 1 else 1 / (1 - p)), mask

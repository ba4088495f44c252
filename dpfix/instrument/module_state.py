"""Everything a forward pass can write into a model: copied, compared and put back."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils.weak import WeakIdKeyDictionary

from dpfix.instrument import pytree
from dpfix.instrument.rng import rng_untouched
from dpfix.instrument.sharded import local

Key = tuple[str, str]
"""``(module path, name)`` of a piece of state."""
_LAZY = (UninitializedParameter, UninitializedBuffer)
_ABSENT: Any = object()
_NOT_STATE = frozenset({"training", "forward"})
_COPIES: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Of parameters, the copies that somebody still keeps, as weak references."""


def state_of(root: nn.Module) -> dict[Key, Any]:
    """Copies of everything a forward pass can write: parameters, buffers and plain attributes.

    Returns:
        Values by ``(module path, name)``; containers of tensors are copied one level deep. Nobody may write into a copy of a
        parameter (:func:`copied`).
    """
    out: dict[Key, Any] = {}
    for path, module in root.named_modules():
        for name, value in _slots(module):
            out[path, name] = _copy(value)
    return out


def tensors_held(root: nn.Module) -> Iterator[torch.Tensor]:
    """The tensors that a model holds beside its parameters: buffers, and attributes or what is in containers there.

    Yields:
        The tensors.
    """
    for module in root.modules():
        for name, value in vars(module).items():
            if name not in ("_parameters", "_modules") and isinstance(value, (torch.Tensor, list, tuple, dict)):
                yield from pytree.tensors(value)


def _slots(module: nn.Module) -> Iterator[tuple[str, Any]]:
    yield from module._parameters.items()
    yield from module._buffers.items()
    for name, value in vars(module).items():
        if name.startswith("_") or name in _NOT_STATE:
            continue
        if value is None or isinstance(value, (torch.Tensor, bool, int, float, str, list, dict)):
            yield name, value


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """The values of a tensor, to be read only: copies of a parameter that are kept at one time, and equal, are one copy.

    Returns:
        A copy.
    """
    if not isinstance(tensor, nn.Parameter):
        return tensor.detach().clone()
    known = _COPIES.get(tensor)
    copy = known() if known is not None else None
    if copy is None or not _alike(copy, tensor):
        copy = tensor.detach().clone()
        _COPIES[tensor] = weakref.ref(copy)
    return copy


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device) and torch.equal(local(a), local(b.detach()))


def _copy(value: Any) -> Any:
    if isinstance(value, _LAZY):
        return value
    if isinstance(value, nn.Parameter):
        return copied(value)
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, list):
        return [_copy(v) if isinstance(v, torch.Tensor) else v for v in value]
    if isinstance(value, dict):
        return {k: _copy(v) if isinstance(v, torch.Tensor) else v for k, v in value.items()}
    return value


def same(a: Any, b: Any) -> bool:
    """Whether two pieces of state are equal.

    Returns:
        Equality; NaN equals NaN.
    """
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if isinstance(a, _LAZY) or isinstance(b, _LAZY):
            return a is b
        return a.shape == b.shape and a.dtype == b.dtype and _equal(a, b)
    if isinstance(a, (list, dict)) and type(a) is type(b):
        if len(a) != len(b):
            return False
        pairs = zip(a, b, strict=True) if isinstance(a, list) else ((a[k], b.get(k)) for k in a)
        return all(same(x, y) for x, y in pairs)
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return False
    try:
        return bool(a is b or a == b)
    except (ValueError, RuntimeError):
        return a is b


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = local(a.detach()), local(b.detach())
    if torch.equal(a, b):
        return True
    real = [torch.view_as_real(t) if t.is_complex() else t for t in (a, b)]
    if not (real[0].is_floating_point() and bool(torch.isnan(real[0]).any())):
        return False
    nan = [torch.isnan(t) for t in real]
    return torch.equal(*nan) and torch.equal(*(t.masked_fill(n, 0) for t, n in zip(real, nan, strict=True)))


def written(root: nn.Module, before: Mapping[Key, Any]) -> dict[Key, Any]:
    """What has changed since a snapshot.

    Returns:
        Present values (copies) of every piece of state that differs or is new.
    """
    return {
        (path, name): _copy(value)
        for path, module in root.named_modules()
        for name, value in _slots(module)
        if (path, name) not in before or not same(value, before[path, name])
    }


def put_back(root: nn.Module, before: Mapping[Key, Any]) -> None:
    """Restore a snapshot in place: the same tensor objects with the old values."""
    modules = dict(root.named_modules())
    for (path, name), value in before.items():
        _restore(modules[path], name, value)
    for path, module in modules.items():
        for name in [n for n, _ in _slots(module) if (path, n) not in before]:
            if name in vars(module):
                delattr(module, name)


def _restore(module: nn.Module, name: str, value: Any) -> None:
    current = getattr(module, name, None)
    if _escaped(current):
        (module._buffers if name in module._buffers else vars(module))[name] = _copy(value)
        return
    if isinstance(value, _LAZY) or same(current, value):
        return
    fits = isinstance(current, torch.Tensor) and isinstance(value, torch.Tensor)
    if fits and current.shape == value.shape and (current.is_leaf or not current.requires_grad):  # type: ignore[union-attr]
        with torch.no_grad():
            current.data.copy_(value)  # type: ignore[union-attr]
    elif name in module._buffers:
        module._buffers[name] = _copy(value)  # the snapshot itself must not be written to
    elif name in module._parameters:
        if current is not None:
            current.data = value.clone()  # type: ignore[union-attr]
    elif isinstance(current, (list, dict)) and type(current) is type(value):
        _refill(current, value)  # the same container: other modules may hold it, too
    else:
        vars(module)[name] = _copy(value)


def _escaped(value: Any) -> bool:
    """Whether a forward pass inside ``vmap`` has left one of its tensors behind, which nobody can read outside."""
    return isinstance(value, torch.Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value)  # type: ignore[attr-defined]


def _refill(container: Any, value: Any) -> None:
    container.clear()
    (container.extend if isinstance(container, list) else container.update)(_copy(value))


def _same_object(module: nn.Module, name: str, thing: Any) -> None:
    """Put the very tensor or container back where a forward pass has bound another with, by now, the old values."""
    holder: dict[str, Any] = module._buffers if name in module._buffers else vars(module)
    current = holder.get(name)
    if current is thing or name in module._parameters or type(current) is not type(thing):
        return
    if not same(current, thing):
        thing.data.copy_(current) if isinstance(current, torch.Tensor) else _refill(thing, current)
    holder[name] = thing


class Scratch:
    """Attributes that every forward pass overwrites, put back when asked: nothing of a batch outlives its step.

    Args:
        keys: the attributes; each is put back to what it is now.
    """

    def __init__(self, root: nn.Module, keys: Iterable[Key]) -> None:
        modules = dict(root.named_modules())
        self._kept = [
            (vars(modules[path]), name, vars(modules[path]).get(name, _ABSENT), _copy(vars(modules[path]).get(name)))
            for path, name in keys
        ]

    def put_back(self) -> None:
        """The same objects with the old contents; tensors that a forward pass has bound are left alone."""
        for attributes, name, thing, value in self._kept:
            if thing is _ABSENT:
                attributes.pop(name, None)
                continue
            if not same(thing, value):
                thing.data.copy_(value) if isinstance(thing, torch.Tensor) else _refill(thing, value)
            attributes[name] = thing


@contextmanager
def traceless(root: nn.Module, before: dict[Key, Any] | None = None) -> Iterator[dict[Key, Any]]:
    """Whatever happens inside, the model and every generator are afterwards bit-identical to before.

    Parameters, buffers, attributes, ``.grad`` and the training flags are put back, also when the body raises.

    Args:
        before: a snapshot of its present state, if there already is one.

    Yields:
        The snapshot of the model's state.
    """
    before = state_of(root) if before is None else before
    flags = {module: (module.training, module._is_full_backward_hook) for module in root.modules()}
    held = (torch.Tensor, list, dict)
    objects = [(m, name, t) for m in root.modules() for name, t in _slots(m) if isinstance(t, held)]
    grads = {p: (p.grad, None if p.grad is None else p.grad.clone()) for p in root.parameters()}
    with rng_untouched():
        try:
            for p in grads:
                p.grad = None
            yield before
        finally:
            put_back(root, before)
            for module, name, tensor in objects:
                _same_object(module, name, tensor)
            for module, (training, full_hook) in flags.items():
                module.training, module._is_full_backward_hook = training, full_hook
            for p, (grad, value) in grads.items():
                p.grad = grad
                if grad is not None and value is not None and not torch.equal(grad, value):
                    grad.copy_(value)


def finished(thing: Any) -> TypeGuard[nn.Module]:
    """Whether something is a module whose constructor has run to the end."""
    return isinstance(thing, nn.Module) and "_modules" in vars(thing)

"""Running a model without leaving a trace, and running it so that a sample's randomness is its own."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils._python_dispatch import TorchDispatchMode

Key = tuple[str, str]
"""``(module path, name)`` of a piece of state."""

_LAZY = (UninitializedParameter, UninitializedBuffer)
_ABSENT: Any = object()
_NOT_STATE = frozenset({"training", "forward"})


@contextmanager
def rng_untouched(*, only_on_error: bool = False) -> Iterator[None]:
    """Python's, NumPy's and torch's generators (CPU and CUDA) are afterwards as they were before.

    Args:
        only_on_error: put them back only if the body raises.

    Yields:
        Nothing.
    """
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    done = False
    try:
        yield
        done = True
    finally:
        if not (done and only_on_error):
            random.setstate(python)
            np.random.set_state(numpy)
            torch.set_rng_state(cpu)
            if cuda:
                torch.cuda.set_rng_state_all(cuda)


def generator_states() -> list[torch.Tensor]:
    """States of torch's default generators (CPU and CUDA); equal ones show that nothing was drawn in between.

    Returns:
        One tensor per generator.
    """
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *cuda]


def state_of(root: nn.Module) -> dict[Key, Any]:
    """Copies of everything a forward pass can write: parameters, buffers and plain attributes.

    Args:
        root: a model.

    Returns:
        Values by ``(module path, name)``; containers of tensors are copied one level deep.
    """
    out: dict[Key, Any] = {}
    for path, module in root.named_modules():
        for name, value in _slots(module):
            out[path, name] = _copy(value)
    return out


def _slots(module: nn.Module) -> Iterator[tuple[str, Any]]:
    yield from module._parameters.items()
    yield from module._buffers.items()
    for name, value in vars(module).items():
        if name.startswith("_") or name in _NOT_STATE:
            continue
        if value is None or isinstance(value, (torch.Tensor, bool, int, float, str, list, dict)):
            yield name, value


def _copy(value: Any) -> Any:
    if isinstance(value, _LAZY):
        return value
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, list):
        return [_copy(v) if isinstance(v, torch.Tensor) else v for v in value]
    if isinstance(value, dict):
        return {k: _copy(v) if isinstance(v, torch.Tensor) else v for k, v in value.items()}
    return value


def same(a: Any, b: Any) -> bool:
    """Whether two pieces of state are equal.

    Args:
        a: a value of :func:`state_of`.
        b: another.

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
    a, b = a.detach(), b.detach()
    if torch.equal(a, b):
        return True
    real = [torch.view_as_real(t) if t.is_complex() else t for t in (a, b)]
    if not (real[0].is_floating_point() and bool(torch.isnan(real[0]).any())):
        return False
    nan = [torch.isnan(t) for t in real]
    return torch.equal(*nan) and torch.equal(*(t.masked_fill(n, 0) for t, n in zip(real, nan, strict=True)))


def written(root: nn.Module, before: Mapping[Key, Any]) -> dict[Key, Any]:
    """What has changed since a snapshot.

    Args:
        root: the model.
        before: its snapshot.

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
    """Restore a snapshot in place: the same tensor objects with the old values.

    Args:
        root: the model.
        before: its snapshot.
    """
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
            current.data = value  # type: ignore[union-attr]
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
        root: the model.
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
        root: the model.
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


class FixedRandomness(TorchDispatchMode):
    """Every random operation gives fixed values that depend on the index in the last dimension alone.

    A sample alone and the same sample in a batch, wherever the batch dimension is, then see the same noise and the
    same dropout mask, so that their gradients can be compared.

    Args:
        stack: paths of the modules that are being called, kept by the caller.

    Attributes:
        random_ops: the random operations met, with the module paths that were being called.
        low_precision: whether a result in half precision was met.
    """

    def __init__(self, stack: list[str] | None = None) -> None:
        super().__init__()
        self.stack = stack if stack is not None else []
        self.random_ops: dict[str, set[str]] = {}
        self.low_precision = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags and _draws(func, args, kwargs):
            self.random_ops.setdefault(func.__name__, set()).update(self.stack)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(7)
                return _fixed(func, args, kwargs)
        out = func(*args, **kwargs)
        if isinstance(out, torch.Tensor) and out.dtype in (torch.bfloat16, torch.float16):
            self.low_precision = True
        return out


def _given(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    return dict(zip([a.name for a in func._schema.arguments], args, strict=False)) | kwargs


def _draws(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether this call draws: attention and dropout with probability 0 do not."""
    given = _given(func, args, kwargs)
    if "dropout_p" in (a.name for a in func._schema.arguments):
        return float(given.get("dropout_p") or 0) > 0
    return "dropout" not in func.__name__ or float(given.get("p") or 0) > 0


def _fixed(func: Any, args: Any, kwargs: Any) -> Any:
    name = func.__name__.split(".")[0]
    given = _given(func, args, kwargs)
    if name == "native_dropout":
        keep = 1 - given["p"]
        mask = _spread(given["input"], lambda row: _keep(row, keep))
        return given["input"] * mask / max(1e-12, keep), mask.bool()
    if name == "multinomial":
        return _multinomial(func, given)
    out = func(*args, **kwargs)
    fill = _FILL.get(name)
    if isinstance(out, torch.Tensor) and fill is not None:
        torch.manual_seed(7)  # the draw above took as many numbers as there are rows
        out.copy_(_spread(out, lambda row: fill(row, given)))
    return out


def _multinomial(func: Any, given: dict[str, Any]) -> torch.Tensor:
    """Every row is drawn from its own weights with the same numbers, as if it were alone."""
    weights, others = given["self"], {k: v for k, v in given.items() if k != "self"}
    drawn = []
    for row in weights.reshape(-1, weights.shape[-1]):
        torch.manual_seed(7)
        drawn.append(func(row, **others))
    return torch.stack(drawn).view(*weights.shape[:-1], -1)


def _spread(like: torch.Tensor, fill: Any) -> torch.Tensor:
    """A tensor like another, equal along every dimension but the last; constant if it has only one."""
    row = torch.empty(like.shape[-1] if like.dim() > 1 else 1, dtype=like.dtype, device=like.device)
    fill(row)
    return row.expand(like.shape) if like.dim() else row.reshape(())


def _keep(row: torch.Tensor, probability: float) -> torch.Tensor:
    """A mask; one that would be constant keeps everything, since nothing could be compared behind it."""
    return row.bernoulli_(probability) if row.numel() > 1 else row.fill_(1)


def _bernoulli(row: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
    p = given.get("p", 0.5)
    return _keep(row, p if isinstance(p, float) else 0.5)


_FILL: Mapping[str, Any] = {
    "randn": lambda row, given: row.normal_(),
    "randn_like": lambda row, given: row.normal_(),
    "normal_": lambda row, given: row.normal_(given.get("mean", 0.0), given.get("std", 1.0)),
    "rand": lambda row, given: row.uniform_(),
    "rand_like": lambda row, given: row.uniform_(),
    "uniform_": lambda row, given: row.uniform_(given.get("from", 0.0), given.get("to", 1.0)),
    "exponential_": lambda row, given: row.exponential_(given.get("lambd", 1.0)),
    "randint": lambda row, given: row.random_(given.get("low", 0), given["high"]),
    "randint_like": lambda row, given: row.random_(given.get("low", 0), given["high"]),
    "bernoulli_": _bernoulli,
    "bernoulli": _bernoulli,  # what dropout becomes under vmap
}

"""Running code that was written for single precision in double precision."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from dpfix.instrument.in_place import is_in_place

_LEFT_ALONE = frozenset({
    "__get__",
    "__set__",
    "register_hook",
    "requires_grad_",
    "retain_grad",
    "backward",
    "to_sparse",
})


class DoublePrecision(TorchFunctionMode):
    """Every torch function gets double-precision tensors where it was given single-precision ones.

    Class weights in a criterion, masks and constants of the user's code, and conversions to single precision that stand in it
    then do not stop a model that was converted. What is created without a dtype is in double precision too.

    Attributes:
        half: whether half precision was met, which no conversion can undo.
    """

    def __init__(self) -> None:
        super().__init__()
        self.half = False
        self._default = torch.get_default_dtype()

    def __enter__(self) -> DoublePrecision:
        self._default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        torch.set_default_dtype(self._default)
        super().__exit__(*raised)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _LEFT_ALONE:
            return func(*args, **kwargs)
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        if args and is_in_place(name, kwargs):
            target = args[0]
            if isinstance(target, torch.Tensor) and target.dtype is torch.float32:  # what is written has to fit
                return func(target, *map(_single, args[1:]), **{k: _single(v) for k, v in kwargs.items()})
            args = (target, *map(_doubled, args[1:]))
        else:
            args = tuple(map(_doubled, args))
        output = func(*args, **{k: v if k == "out" else _doubled(v) for k, v in kwargs.items()})
        self.half |= isinstance(output, torch.Tensor) and output.dtype in (torch.float16, torch.bfloat16)
        return output


def _single(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype is torch.float64 else value


def _doubled(value: Any) -> Any:
    if value is torch.float32:
        return torch.float64
    if isinstance(value, torch.Tensor):
        return value.double() if value.dtype is torch.float32 else value
    if type(value) in (list, tuple):
        return type(value)(map(_doubled, value))
    return value

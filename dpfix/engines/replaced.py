"""What stands in for a module's ``forward``, or for its call, while an engine is attached; and when it has work to do."""

from __future__ import annotations

import inspect
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch._C._functorch import TransformType


class Replaced:
    """Stands in for a method of one module; a copy of the module, or a pickled one, gets its class's own back.

    What another package has put on the module (accelerate's autocast, a forward of the trainer) stays in force: below, if it was
    there before, and above, if it came later.

    Attributes:
        name: name of the method.
        module: the module.
        original: what the method was before.
    """

    name = "forward"

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.original = getattr(module, self.name)
        self._before: Any = None

    def put_in(self) -> None:
        """Stand in from now on."""
        self._before = vars(self.module).get(self.name)
        vars(self.module)[self.name] = self

    def take_out(self) -> None:
        """Give the module back what the method was before."""
        now = vars(self.module).get(self.name)
        if now is not self and now is not None:
            # somebody else's stands in front of it, and goes on calling it
            self.__class__ = _PassedOn  # type: ignore[assignment]
            vars(self).update(handle=None)
        elif self._before is None:
            vars(self.module).pop(self.name, None)
        else:
            vars(self.module)[self.name] = self._before

    @property
    def __func__(self) -> Any:
        """As a bound method has it: whoever wraps that (accelerate) binds the wrapper to the module, and a copy to the copy."""
        return partial(_bound, self)

    @property
    def __signature__(self) -> inspect.Signature:
        """The method's own: trainers and ``generate`` choose columns and arguments by it."""
        return inspect.signature(self.original)

    def __reduce__(self) -> Any:
        return _own, (self.module, self.name)


def _bound(replaced: Replaced, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    method: Any = replaced if module is replaced.module else _own(module, replaced.name)
    return method(*args, **kwargs)


class _PassedOn(Replaced):
    """What is left of one that was taken out."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the method was before."""
        return self.original(*args, **kwargs)


def _own(module: nn.Module | None, name: str) -> Any:
    return None if module is None else MethodType(getattr(type(module), name), module)


def takes_gradients(module: nn.Module) -> bool:
    """Whether gradients are being taken: the module is in training mode, and gradients are on."""
    return module.training and torch.is_grad_enabled()


def transformed() -> bool:
    """Whether a ``torch.func`` transform (grad, vmap, jvp) is going on."""
    return torch._C._are_functorch_transforms_active()  # type: ignore[attr-defined]


def mapped_only() -> bool:
    """Whether all transforms that are going on are ``vmap``."""
    levels = torch._C._functorch.get_interpreter_stack() or ()  # type: ignore[attr-defined]
    return all(level.key() == TransformType.Vmap for level in levels)


def is_recorded(module: nn.Module) -> bool:
    """Whether a call of a module is one whose per-sample gradients are wanted: in training, and not transformed."""
    return takes_gradients(module) and not transformed()

"""Lazy modules create their parameters by one forward pass, and can be made lazy again."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules import lazy
from torch.nn.modules.lazy import LazyModuleMixin

from dpfix.errors import ModelError


def materialise(module: nn.Module, first_forward: Callable[[], object]) -> bool:
    """Let lazy modules create their parameters, by one forward pass.

    The initialisers draw from the script's generators as its own first forward pass would have.

    Returns:
        Whether there was anything to create.

    Raises:
        ModelError: a parameter is still without shape.
    """
    if not _lazy(module):
        return False
    with torch.enable_grad():
        first_forward()
    left = _lazy(module)
    if left:
        raise ModelError(
            f"module: lazy parameter `{left[0]}` of {type(module).__name__} was not created by one training step.",
            help="Run one forward pass that uses it before make_private_safe, or remove the layer.",
            path=left[0],
        )
    return True


def remembered_lazy(module: nn.Module) -> Callable[[], None]:
    """What gives the lazy modules of a model back their state before they created their parameters.

    Returns:
        A function that makes every lazy module, and every parameter without shape, again what it is now.
    """
    modules = [m for m in module.modules() if isinstance(m, LazyModuleMixin)]
    inner = (
        "_parameters",
        "_buffers",
        "_forward_pre_hooks",
        "_forward_pre_hooks_with_kwargs",
        "_load_state_dict_pre_hooks",
    )
    before = [(m, type(m), dict(vars(m)), {name: dict(vars(m)[name]) for name in inner}) for m in modules]
    tensors = [
        t for m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None and lazy.is_lazy(t)
    ]
    shapeless = [(t, type(t), t.data) for t in tensors]

    def undo() -> None:
        for m, cls, attributes, containers in before:
            m.__class__ = cls
            vars(m).clear()
            vars(m).update(attributes)
            for name, content in containers.items():
                vars(m)[name].clear()
                vars(m)[name].update(content)
        for t, cls, data in shapeless:
            t.data = data
            t.__class__ = cls  # pyright: ignore[reportAttributeAccessIssue]

    return undo


def is_lazy(module: nn.Module) -> bool:
    """Whether a model has parameters or buffers without shape."""
    return bool(_lazy(module))


def _lazy(module: nn.Module) -> list[str]:
    return [n for n, t in (*module.named_parameters(), *module.named_buffers()) if t is not None and lazy.is_lazy(t)]

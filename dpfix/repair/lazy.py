"""Lazy modules create their parameters by one forward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules import lazy

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


def is_lazy(module: nn.Module) -> bool:
    """Whether a model has parameters or buffers without shape."""
    return bool(_lazy(module))


def _lazy(module: nn.Module) -> list[str]:
    return [n for n, t in (*module.named_parameters(), *module.named_buffers()) if t is not None and lazy.is_lazy(t)]

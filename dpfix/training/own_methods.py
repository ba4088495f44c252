"""Methods that an optimizer's class has besides those of torch: ``train()`` and ``eval()`` of schedule-free optimizers."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer


def own_method(optimizer: Any, name: str) -> Callable[..., Any]:
    """A public method of the script's optimizer, for the private one around it.

    While it runs there is no ``p.grad``: only the step may see gradients, after they have been clipped and noised.

    Args:
        optimizer: the private optimizer, which has no attribute of that name.

    Returns:
        The method.

    Raises:
        AttributeError: there is none.
    """
    original = vars(optimizer).get("original_optimizer")
    static = inspect.getattr_static(type(original), name, None)
    if name.startswith("_") or not inspect.isfunction(static) or hasattr(Optimizer, name):
        raise AttributeError(f"{type(optimizer).__name__!r} object has no attribute {name!r}")

    @functools.wraps(static)
    def without_gradients(*args: Any, **kwargs: Any) -> Any:
        parameters = [p for group in original.param_groups for p in group["params"]]  # type: ignore[union-attr]
        gradients = [p.grad for p in parameters]
        try:
            for p in parameters:
                p.grad = None
            return getattr(original, name)(*args, **kwargs)
        finally:
            for p, gradient in zip(parameters, gradients, strict=True):
                p.grad = gradient

    return without_gradients

"""Objects that a framework has wrapped: a call works on what is inside, and returns like wrappers.

Lightning's Fabric wraps the model, whose ``forward`` then sets the precision, and the loader, which moves batches to a device.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from dpfix.sampling.inner_loader import around, inner_loader
from dpfix.training.result import PrivateTraining

INSIDE = {"_FabricModule": "_forward_module"}
"""Name of a class of wrappers, and the attribute in which it keeps the model."""


def on_wrapped(call: Callable[..., Any]) -> Callable[..., Any]:
    """A call that works on what is inside of wrappers.

    Args:
        call: takes ``module`` and ``data_loader``, and may return a :class:`PrivateTraining`.

    Returns:
        The call; what it returns has like wrappers around the private model and loader where it was given wrappers.
    """

    @functools.wraps(call)
    def on_inner(*args: Any, **kwargs: Any) -> Any:
        model, loader = kwargs.get("module"), kwargs.get("data_loader")
        inner_model, inner = _inner_model(model), inner_loader(loader)
        if inner_model is model and inner is loader:
            return call(*args, **kwargs)
        made = call(*args, **{**kwargs, "module": inner_model, "data_loader": inner})
        if not isinstance(made, PrivateTraining):
            return made
        private, optimizer, private_loader = made
        if inner_model is not model and isinstance(private, nn.Module):
            private = _around_model(model, inner_model, private)
        return made.with_objects(
            private, optimizer, private_loader if inner is loader else around(loader, private_loader)
        )

    return on_inner


def _inner_model(model: Any) -> Any:
    names = {cls.__name__ for cls in type(model).__mro__}
    return next((getattr(model, inside) for name, inside in INSIDE.items() if name in names), model)


def _around_model(wrapper: Any, inner: Any, private: nn.Module) -> Any:
    wrapped = copy.copy(wrapper)
    modules = {name: private if child is inner else child for name, child in wrapper._modules.items()}
    vars(wrapped)["_modules"] = modules
    return wrapped

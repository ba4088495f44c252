"""A loader inside a wrapper that is no ``DataLoader``: Lightning Fabric's, or one that moves batches to a device."""

from __future__ import annotations

import copy
from typing import Any

from torch.utils.data import DataLoader


def inner_loader(loader: Any) -> Any:
    """The ``DataLoader`` that a wrapper iterates over.

    Args:
        loader: a loader or a wrapper of one.

    Returns:
        The only ``DataLoader`` among the attributes of what is none; else the object itself.
    """
    if isinstance(loader, DataLoader):
        return loader
    held = {id(value): value for value in getattr(loader, "__dict__", {}).values() if isinstance(value, DataLoader)}
    return next(iter(held.values())) if len(held) == 1 else loader


def around(wrapper: Any, loader: Any) -> Any:
    """A wrapper like the given one around another loader.

    Args:
        wrapper: what holds a loader.
        loader: the loader to be held in its place.

    Returns:
        A shallow copy; attributes that the wrapper has taken from its loader, as Fabric's does, are those of the new one.
    """
    inner, wrapped = inner_loader(wrapper), copy.copy(wrapper)
    old, new = vars(inner), vars(loader)
    for name, value in vars(wrapper).items():
        if value is inner:
            vars(wrapped)[name] = loader
        elif name in old and name in new and value is old[name]:
            vars(wrapped)[name] = new[name]
    return wrapped

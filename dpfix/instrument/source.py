"""Where a module stands, for messages."""

from __future__ import annotations

import inspect
import os

from torch import nn


def place(root: nn.Module, path: str) -> str:
    """Where a module stands, for messages.

    Args:
        root: the model.
        path: module path; empty for the root.

    Returns:
        Class, path, and class and source line of the module that holds it.
    """
    module = root.get_submodule(path)
    name = type(module).__name__
    if not path:
        return f"{name} (the root module{_source(module)})"
    owner, above = root, path.rpartition(".")[0]
    while above:
        candidate = root.get_submodule(above)
        if not type(candidate).__module__.startswith("torch.nn"):
            owner = candidate
            break
        above = above.rpartition(".")[0]
    return f"{name} at `{path}` (in {type(owner).__name__}{_source(owner)})"


def _source(module: nn.Module) -> str:
    cls = type(module)
    try:
        file = inspect.getsourcefile(cls)
        line = inspect.getsourcelines(cls)[1]
    except (OSError, TypeError):
        return ""
    return f", {os.path.basename(file)}:{line}" if file else ""

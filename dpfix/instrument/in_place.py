"""Which torch functions overwrite their first argument."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_IN_PLACE_OPERATORS = frozenset(
    f"__i{op}__" for op in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
) | {"__setitem__"}


def is_in_place(name: str, kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of a torch function overwrites its first argument.

    Returns:
        Whether it does.
    """
    if name in _IN_PLACE_OPERATORS or kwargs.get("inplace") is True:
        return True
    return name.endswith("_") and not name.endswith("__") and not name.startswith("requires_grad")

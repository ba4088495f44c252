"""What a function is made of, as far as names, closures and attributes show."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import partial
from types import CodeType
from typing import Any

from torch import nn


def is_number(thing: Any) -> bool:
    """Whether this is a number; a truth value is none."""
    return isinstance(thing, (int, float)) and not isinstance(thing, bool)


def reachable(*roots: Any) -> Iterator[Any]:
    """Functions, and whatever they refer to that is neither a function nor a method: modules, tensors, numbers, objects.

    Args:
        *roots: functions, methods, ``functools.partial``, or anything else.

    Yields:
        Each thing once.
    """
    todo, seen = list(roots), set[int]()
    while todo:
        thing = todo.pop(0)
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, partial):
            todo += [thing.func, *thing.args, *thing.keywords.values()]
        elif inspect.ismethod(thing):
            own = thing.__self__
            todo += [thing.__func__, *([own] if isinstance(own, nn.Module) else getattr(own, "__dict__", {}).values())]
        elif inspect.isfunction(thing):
            if (thing.__module__ or "").startswith("torch"):
                continue
            yield thing
            variables = inspect.getclosurevars(thing)
            inside = [thing.__globals__[name] for name in _names_inside(thing.__code__) if name in thing.__globals__]
            todo += [*variables.nonlocals.values(), *variables.globals.values(), *inside, *(thing.__defaults__ or ())]
        else:
            yield thing


def _names_inside(code: CodeType) -> Iterator[str]:
    """Names that the functions and comprehensions inside of a function refer to."""
    for part in code.co_consts:
        if isinstance(part, CodeType):
            yield from part.co_names
            yield from _names_inside(part)

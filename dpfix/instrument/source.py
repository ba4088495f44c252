"""Where something stands in the user's code, for messages: modules, lines, and the place that a warning points at."""

from __future__ import annotations

import dis
import functools
import inspect
import os
import sys
import warnings
from types import FrameType
from typing import Any

import opacus
import torch
from torch import nn

from dpfix.errors import DPFixWarning

_OWN = tuple(
    os.path.dirname(os.path.abspath(file)) + os.sep
    for file in (os.path.dirname(__file__), torch.__file__, opacus.__file__)
)
"""Folders of dpfix, torch and Opacus."""


def calling_line() -> str:
    """The innermost line of code that is neither torch's, Opacus's nor dpfix's.

    Returns:
        ``file:line``, or an empty string if there is none.
    """
    frame = sys._getframe(1)
    while frame is not None:
        name = _users_file(frame.f_code.co_filename)
        if name:
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def warn_user(text: str) -> None:
    """Warn at the line of the user's code that led here."""
    level, frame = 1, sys._getframe(0)
    while frame.f_back is not None and not _users_file(frame.f_code.co_filename):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, DPFixWarning, stacklevel=level)


@functools.cache
def is_users_file(file: str) -> bool:
    """Whether code comes from elsewhere than torch, Opacus and dpfix; that of a notebook or of ``exec`` counts, too."""
    return file.startswith("<") or not os.path.abspath(file).startswith(_OWN)


@functools.cache
def _users_file(file: str) -> str:
    """The name of a file, if it is the user's; empty otherwise."""
    own = os.path.abspath(file).startswith(_OWN) or file.startswith("<")
    return "" if own else os.path.basename(file)


def describe_module(root: nn.Module, path: str) -> str:
    """Where a module stands, for messages.

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


def line_of_code(function: Any) -> str:
    """Where a function is defined: ``file:line``; the name of its class if it is an object."""
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    return f"{os.path.basename(code.co_filename)}:{code.co_firstlineno}" if code else type(function).__name__


def _source(module: nn.Module) -> str:
    cls = type(module)
    try:
        file = inspect.getsourcefile(cls)
        line = inspect.getsourcelines(cls)[1]
    except (OSError, TypeError):
        return ""
    return f", {os.path.basename(file)}:{line}" if file else ""


def takes_attribute(frame: FrameType) -> bool:
    """Whether the next thing that a frame does is to take an attribute of what it has just read.

    Args:
        frame: a frame that is reading an attribute.

    Returns:
        Whether it does, as in ``p.grad.norm()``; not in ``if p.grad is not None``.
    """
    later = (i for i in dis.get_instructions(frame.f_code) if i.offset > frame.f_lasti and i.opname != "CACHE")
    return next((i.opname in {"LOAD_ATTR", "LOAD_METHOD"} for i in later), False)

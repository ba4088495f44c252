"""Telling the calls of one step apart: which module, in which call of the model, from which line, how often before."""

from __future__ import annotations

import functools
import os
import sys
from dataclasses import dataclass

import torch

_HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_TORCH = os.path.dirname(os.path.abspath(torch.__file__))


def user_place() -> str:
    """The innermost line of code that is neither torch's nor dpfix's.

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


@functools.cache
def _users_file(file: str) -> str:
    """The name of a file, if it is neither torch's nor dpfix's."""
    path = os.path.abspath(file)
    own = path.startswith((_HERE + os.sep, _TORCH + os.sep)) or file.startswith("<")
    return "" if own else os.path.basename(path)


@dataclass(frozen=True)
class CallSite:
    """One call of a module in a training step.

    Attributes:
        path: path of the module.
        root: how many calls of the model came before in the step; -1 outside the model.
        place: ``file:line`` that makes the call; empty for the model itself, which the loop calls.
        number: how many calls of this module from this line came before in that call of the model.
    """

    path: str
    root: int
    place: str
    number: int


class CallCounter:
    """Numbers the calls of a step that happen while gradients are being taken."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """A new step begins."""
        self._root = -1
        self._counts: dict[tuple[str, str], int] = {}

    def site(self, path: str) -> CallSite:
        """A module is being called now.

        Args:
            path: its path.

        Returns:
            Which call it is.
        """
        if not path:
            self._root += 1
            self._counts.clear()
            return CallSite("", self._root, "", 0)
        place = user_place()
        number = self._counts.get((path, place), 0)
        self._counts[path, place] = number + 1
        return CallSite(path, self._root, place, number)

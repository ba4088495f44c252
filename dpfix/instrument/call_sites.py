"""Telling the calls of one step apart: which module, in which call of the model, from which line, how often before."""

from __future__ import annotations

from dataclasses import dataclass

from dpfix.instrument.source import calling_line


@dataclass(frozen=True)
class CallSite:
    """One call of a module in a training step.

    Attributes:
        path: path of the module.
        root: how many calls of the model came before in the step; -1 outside the model.
        line: ``file:line`` that makes the call; empty for the model itself, which the loop calls.
        number: how many calls of this module from this line came before in that call of the model.
    """

    path: str
    root: int
    line: str
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

        Returns:
            Which call it is.
        """
        if not path:
            self._root += 1
            self._counts.clear()
            return CallSite("", self._root, "", 0)
        line = calling_line()
        number = self._counts.get((path, line), 0)
        self._counts[path, line] = number + 1
        return CallSite(path, self._root, line, number)

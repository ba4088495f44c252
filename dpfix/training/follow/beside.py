"""What of a batch reaches the model, or the step, beside the model's arguments: attributes, hooks, settings of the optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from dpfix.instrument import pytree
from dpfix.training.follow.calls import Call, ModelCall, parts_of
from dpfix.training.follow.numbers import looks_like_a_setting

# ------------------------------------------------------------------ tensors


def attribute_of_batch(module: nn.Module, known: Callable[[torch.Tensor], bool]) -> str:
    """The attribute or buffer of a model that holds something of a batch; empty if there is none.

    Args:
        module: the model.
        known: whether a tensor is of a batch.

    Returns:
        Its path.
    """
    for path, part in module.named_modules():
        for name, value in (*vars(part).items(), *part._buffers.items()):
            if isinstance(value, torch.Tensor) and known(value):
                return f"{path}.{name}".lstrip(".")
    return ""


class Inside(TorchFunctionMode):
    """Looks, while a model runs, for tensors of a batch that it was not called with: a hook or a closure holds them.

    Args:
        known: whether a tensor is of a batch.
        given: what the model was called with.

    Attributes:
        found: the first one.
    """

    def __init__(self, known: Callable[[torch.Tensor], bool], given: Any) -> None:
        super().__init__()
        self._known, self._given = known, {id(part) for part in parts_of(given)}
        self.found: torch.Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for part in parts_of((args, kwargs or {})) if self.found is None else ():
            if isinstance(part, torch.Tensor) and id(part) not in self._given and self._known(part):
                self.found = part
        return func(*args, **(kwargs or {}))


# ------------------------------------------------------------------ Python numbers


def settings_of(optimizer: Any) -> dict[Any, float]:
    """Numbers with which an optimizer steps, by group and name."""
    return {
        (number, name): float(value)
        for number, group in enumerate(optimizer.param_groups)
        for name, value in group.items()
        if type(value) in (int, float)
    }


def numbers_of_model(module: nn.Module, calls: Sequence[ModelCall]) -> dict[Any, float]:
    """Numbers that a model's modules have as attributes, or that it was called with, by path and name."""
    found: dict[Any, float] = {}
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            if type(value) in (int, float):
                found[path, name] = float(value)
    for number, call in enumerate(calls):
        for path, value in pytree.leaves((call.args, call.kwargs)):
            if type(value) in (int, float):
                found[number, path] = float(value)
    return found


def numbers_read(calls: Sequence[Call | ModelCall]) -> dict[Any, float]:
    """Numbers that a script has read from a batch, by the place where it did."""
    found: dict[Any, float] = {}
    for call in calls:
        if isinstance(call, Call) and type(call.result) in (int, float) and math.isfinite(call.result):
            found[call.place] = float(call.result)
    return found


class Settings:
    """Numbers outside the loss that follow what the script reads from its batches.

    One does if it is a number that was read, or its inverse, and is none that scripts have as a constant; or if it has changed
    with such a number, or its inverse, in a straight line, for two steps with numbers that are no counts, and for eight else:
    a schedule and a small count do so by chance for a while.

    Args:
        values: the numbers before the first step.
    """

    def __init__(self, values: Mapping[Any, float] | None = None) -> None:
        self._before: dict[Any, float] = dict(values or {})
        self._lines: dict[Any, _Line] = {}

    def changed(self, values: Mapping[Any, float]) -> bool:
        """Whether any of the numbers is another one than before."""
        return values != self._before

    def follow(self, values: Mapping[Any, float], read: Mapping[Any, float]) -> Any:
        """Look for a number that follows the batch.

        Args:
            values: the numbers.
            read: what the script has read in this step.

        Returns:
            The key of one; ``None`` if there is none.
        """
        found = None
        for key, value in values.items():
            if value == self._before.get(key, value):
                continue
            follows = any(_is(value, number) for number in read.values())
            for place, number in read.items():
                for inverse in (False, True) if number else (False,):
                    line = self._lines.setdefault((key, place, inverse), _Line())
                    follows |= line.holds(1 / number if inverse else number, value, number == round(number))
            found = key if follows and found is None else found
        self._before = dict(values)
        return found


class _Line:
    """Whether points lie on a straight line that is not flat."""

    def __init__(self) -> None:
        self._points: list[tuple[float, float]] = []
        self._times = 0

    def holds(self, x: float, y: float, count: bool) -> bool:
        """Another point; whether enough of the last ones have been on one line, and at different places.

        Args:
            x: a number that was read, or its inverse.
            y: one that may follow it.
            count: whether what was read is a count.

        Returns:
            Whether it is sure.
        """
        if any(x == before for before, _ in self._points[-1:]):
            self._times = self._times if y == self._points[-1][1] else 0
            return False
        (x0, y0), (x1, y1) = self._points if len(self._points) == 2 else ((x, y), (x, y))
        on_line = x1 != x0 and y1 != y0 and math.isclose(y, y1 + (y1 - y0) / (x1 - x0) * (x - x1), rel_tol=1e-9)
        self._times = self._times + 1 if on_line else 0
        self._points = [*self._points[-1:], (x, y)]
        return self._times >= (8 if count else 2)


def _is(value: float, read: float) -> bool:
    if looks_like_a_setting(value) or looks_like_a_setting(read):
        return False
    return math.isclose(value, read, rel_tol=1e-9) or (bool(read) and math.isclose(value * read, 1, rel_tol=1e-9))

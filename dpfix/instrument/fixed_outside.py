"""Python's and NumPy's global generators while steps are compared: a draw depends on what is asked for, and on nothing before it.

A step may draw for one sample after the other, or once for all and then for each. In a batch a sample then gets other numbers
than alone, and what it draws says nothing about the others. Here each call of ``random.random`` and the like begins anew,
so that every sample gets the same numbers wherever it is.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

_PATIENCE = 10_000
"""After so many calls of one function it goes on to other numbers: a loop may wait for them."""

_KEEP = frozenset({"seed", "getstate", "setstate", "get_state", "set_state"})
_ORDERS = frozenset({"permutation", "shuffle", "sample", "bytes", "randbytes"})
"""What gives something that has to stay whole."""

_VECTORS = frozenset({"dirichlet", "multinomial", "multivariate_normal"})
"""What gives vectors, whose numbers belong together."""


class FixedOutside:
    """The functions of ``random`` and ``numpy.random`` that draw from the global generators, for one thread.

    Args:
        python: seed of the numbers that take the place of Python's.
        numpy: the same for NumPy's.

        one_by_one: whether they are left as they are, and only counted: each draw gives numbers of its own.

    Attributes:
        drawn: how many calls have drawn.
        thread: the one for which they are fixed.
    """

    def __init__(self, python: int, numpy: int, *, one_by_one: bool = False) -> None:
        self.drawn = 0
        self._one_by_one = one_by_one
        self._calls: Counter[str] = Counter()
        self.thread = threading.get_ident()
        self._seeds = {"random": python, "numpy.random": numpy}
        self._found: list[tuple[Any, str, Callable[..., Any]]] = []

    def __enter__(self) -> FixedOutside:
        self._found = [
            (module, name, function)
            for module, generator in ((random, random._inst), (np.random, np.random.mtrand._rand))  # type: ignore[attr-defined]
            for name, function in vars(module).items()
            if getattr(function, "__self__", None) is generator and name not in _KEEP
        ]
        IN_PLACE.append(self)
        for module, name, function in self._found:
            setattr(module, name, self._instead(module.__name__, name, function))
        return self

    def __exit__(self, *error: Any) -> None:
        for module, name, function in self._found:
            setattr(module, name, function)
        IN_PLACE[:] = [other for other in IN_PLACE if other is not self]

    def _instead(self, module: str, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        kind: Any = random.Random if module == "random" else np.random.RandomState

        def drawn(*args: Any, **kwargs: Any) -> Any:
            own_numbers = name not in (*_ORDERS, *_VECTORS, "choice", "choices") and any(
                map(_several, (*args, *kwargs.values()))
            )
            if threading.get_ident() != self.thread:
                return function(*args, **kwargs)
            self.drawn += 1
            if self._one_by_one or own_numbers:
                return function(*args, **kwargs)
            self._calls[name] += 1
            generator = kind(self._seeds[module] + self._calls[name] // _PATIENCE)
            out = getattr(generator, name)(*args, **kwargs)
            distinct = name == "choice" and not (kwargs.get("replace", True) if len(args) < 3 else args[2])
            return out if name in _ORDERS or distinct else _alike(out, vectors=name in _VECTORS)

        return drawn


IN_PLACE: list[FixedOutside] = []
"""Those whose functions stand in for the generators'."""


def end_all_but(earlier: Sequence[FixedOutside]) -> None:
    """Take off what an interrupt has left in place in this thread."""
    for one in tuple(IN_PLACE):
        if one.thread == threading.get_ident() and not any(one is other for other in earlier):
            one.__exit__()


def _several(value: Any) -> bool:
    """Whether each number has a parameter of its own; a tuple says how many there are."""
    return isinstance(value, list) or (isinstance(value, np.ndarray) and value.ndim > 0)


def _alike(out: Any, *, vectors: bool) -> Any:
    """The same numbers along every dimension but the last; along the only one too, if it is none of a vector."""
    if isinstance(out, list):
        return out[:1] * len(out)
    if not isinstance(out, np.ndarray) or not out.size:
        return out
    row = out.reshape(-1, out.shape[-1])[0] if out.ndim > 1 or vectors else out[:1]
    return np.broadcast_to(row, out.shape).copy()

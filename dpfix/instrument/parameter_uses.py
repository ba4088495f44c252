"""Functions that a script calls on parameters, and on what it has made of parameters and constants alone.

A use is written ``weight&bias@linear/3``: what is used, the function, and how many tensors it was given. In parentheses it
is made of parameters and constants, and is what uses of it are named after: ``(table@__getitem__/2)@add/2``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from dpfix.instrument import pytree

MARK = "@"
"""In every use, and in no path of a module."""


class ParameterUses(TorchFunctionMode):
    """Sees the functions that are called on some tensors.

    Args:
        names: names of the tensors by id: parameters, and later what is made of them.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self._names = dict(names)
        self._held: list[torch.Tensor] = []  # so that no other tensor gets the same id

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = list(arguments(args, kwargs))
        names = dict.fromkeys(self._names[id(t)] for t in given if id(t) in self._names)
        if not names or not torch.is_grad_enabled():
            return self.unused(func, args, kwargs)
        return self.used(f"{'&'.join(names)}{MARK}{function_name(func)}/{len(given)}", func, args, kwargs)

    def unused(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A function is called on nothing that has a name.

        Returns:
            What the function returns.
        """
        return func(*args, **kwargs)

    @abstractmethod
    def used(self, use: str, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A function is called on a tensor that has a name.

        Args:
            use: how that is written.

        Returns:
            What the function returns.
        """

    def named(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor has a name."""
        return id(tensor) in self._names

    def name(self, output: Any, use: str) -> None:
        """Follow what a function has returned."""
        for t in pytree.gradient_tensors(output):
            self._names[id(t)] = use
            self._held.append(t)


def arguments(args: Any, kwargs: Any) -> Iterator[torch.Tensor]:
    """The tensors among the arguments of a function, and those in lists of tensors."""
    for value in (*args, *kwargs.values()):
        for one in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(one, torch.Tensor):
                yield one


def result(func: Callable[..., Any], args: Any, output: Any) -> Any:
    """What a function has made: what it returns, or what it has written to where that is an assignment."""
    return args[0] if func is torch.Tensor.__setitem__ else output


def function_name(func: Callable[..., Any]) -> str:
    """A function's name; an attribute's, where it is the one that reads it."""
    name = getattr(func, "__name__", "")
    return getattr(getattr(func, "__self__", None), "__name__", name) if name == "__get__" else name


def made(use: str) -> str:
    """How a use is written that makes something of parameters and constants alone."""
    return f"({use})"


def bare(use: str) -> str:
    """The same without that it does."""
    return use[1:-1] if use.endswith(")") else use


def function_in(use: str) -> str:
    """The name of the function of a use."""
    return use.rpartition(MARK)[2].partition("/")[0]


def used_in(use: str) -> list[str]:
    """What is used: parameters, and uses in parentheses."""
    found, depth = [""], 0
    for letter in bare(use).rpartition(MARK)[0]:
        depth += (letter == "(") - (letter == ")")
        if letter == "&" and not depth:
            found.append("")
        else:
            found[-1] += letter
    return found

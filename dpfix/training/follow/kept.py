"""What a script has kept of earlier batches: known by identity, also what it makes of it after the step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from weakref import ref

import torch

from dpfix.training.follow.calls import Call, ModelCall, Place, parts_of


class Kept:
    """Tensors of earlier batches, and what was made of them; nothing is kept alive."""

    def __init__(self) -> None:
        self._held: dict[int, ref[torch.Tensor]] = {}
        self._of_model: set[int] = set()

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Those that the script still has."""
        return (t for t in (held() for held in self._held.values()) if t is not None)

    def add(self, things: Iterable[Any], *, of_model: bool = False) -> None:
        """These are of earlier batches.

        Args:
            things: tensors, and others, which are left out.
            of_model: whether the private model has had a part in them.
        """
        new = {id(t): ref(t) for t in things if isinstance(t, torch.Tensor)}
        self._held |= new
        if of_model:
            self._of_model |= new.keys()
        else:
            self._of_model -= new.keys()

    def has(self, thing: Any) -> bool:
        """Whether this very object is one of them."""
        held = self._held.get(id(thing))
        return held is not None and held() is thing

    def among(self, tree: Any) -> bool:
        """Whether one of them is in some arguments."""
        return bool(self._held) and any(self.has(part) for part in parts_of(tree))

    def of_model(self, tree: Any) -> bool:
        """Whether the private model has had a part in one that is in some arguments."""
        return bool(self._of_model) and any(id(part) in self._of_model and self.has(part) for part in parts_of(tree))

    def drop(self, keys: Iterable[int]) -> None:
        """What has these ids is delivered again: a dataset in memory does so."""
        for key in keys:
            self._held.pop(key, None)

    def tidy(self) -> None:
        """Forget what the script has dropped."""
        self._held = {key: held for key, held in self._held.items() if held() is not None}
        self._of_model &= self._held.keys()

    def clear(self) -> None:
        """Forget everything."""
        self._held.clear()
        self._of_model.clear()

    def taken_by(self, calls: Sequence[Call | ModelCall]) -> Place | bool:
        """Whether a loss, or the model, takes any of them.

        Args:
            calls: those that the loss is made of.

        Returns:
            The place where it is taken; true if it is an argument of the model; false if there is none.
        """
        made: set[int] = set()
        for call in calls:
            for part in parts_of((call.args, call.kwargs)):
                if isinstance(part, torch.Tensor) and id(part) not in made and self.has(part):
                    return call.place if isinstance(call, Call) else True
            made |= {id(part) for part in parts_of(call.result)}
        return False

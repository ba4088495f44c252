"""Backward passes between two steps: which forward calls belong to which, and what came back from them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from typing import Any, Generic, TypeVar

from torch import nn

from dpfix.errors import MisuseError, PlanBrokenError


class Iteration(ABC):
    """The forward calls between two backward passes, and what came back from them."""

    @abstractmethod
    def arrived(self) -> dict[int, Any]:
        """What came back, by the number of samples in the model's call."""

    @property
    @abstractmethod
    def begun(self) -> bool:
        """Whether the model was called in it."""

    @abstractmethod
    def clear(self) -> None:
        """Forget what came back; a graph may still lead here."""


Kind = TypeVar("Kind", bound=Iteration)


class Iterations(Generic[Kind]):
    """The iterations since the last step, in order; further calls belong to the last one until a gradient comes back.

    Args:
        start: makes a new iteration.
    """

    def __init__(self, model: nn.Module, start: Callable[[], Kind]) -> None:
        self._model, self._start = model, start
        self._kept = [start()]

    def present(self) -> Kind:
        """The iteration of a call that begins now; one after a backward pass starts a new iteration."""
        if self._kept[-1].arrived():
            self._kept.append(self._start())
        return self._kept[-1]

    @property
    def begun(self) -> bool:
        """Whether the model was called since the last step."""
        return any(iteration.begun for iteration in self._kept)

    def late(self, iteration: Kind) -> None:
        """A gradient comes back to a call of an iteration, which may have been thought to be over."""
        if not any(i is iteration for i in self._kept):
            self._kept.insert(0, iteration)

    def clear(self) -> None:
        """Forget the gradients that have arrived; calls whose backward pass is still to come stay."""
        for iteration in self._kept:
            iteration.clear()
        del self._kept[:-1]

    def finish(self) -> None:
        """Forget everything about the step that was made."""
        self.clear()
        self._kept[:] = [self._start()]

    def arrived(self) -> list[tuple[int, Any]]:
        """What came back, iteration by iteration.

        Returns:
            Number of samples, and what :meth:`Iteration.arrived` holds for it.

        Raises:
            PlanBrokenError: calls with different numbers of samples were added up in one backward pass.
        """
        found: list[tuple[int, Any]] = []
        for iteration in self._kept:
            one = iteration.arrived()
            check_one_size(one, self._model)
            found += one.items()
        return found


def check_one_size(samples: Collection[int], model: nn.Module, error: type[MisuseError] = PlanBrokenError) -> None:
    """One backward pass has to reach calls with the same samples.

    Args:
        samples: the numbers of samples that it reached.

    Raises:
        MisuseError: there are several.
    """
    if len(samples) > 1:
        raise error(
            f"one backward pass left per-sample gradients for different numbers of samples: {sorted(samples)}.",
            help=f"Make the calls of {type(model).__name__} with the same samples, or make one step for each.",
        )

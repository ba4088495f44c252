"""The forward calls between two backward passes, and what came back from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from dpfix.engines.bookkeeping.contributions import Contribution


class Iteration:
    """The forward calls between two backward passes, and what came back from them.

    Attributes:
        found: contributions by parameter, by number of samples of the model's call.
        calls: how often each module was called.
    """

    def __init__(self) -> None:
        self.found: dict[int, dict[nn.Parameter, list[Contribution]]] = {}
        self.calls: dict[str, int] = {}
        self.late: Callable[[Iteration], None] = lambda _: None

    def reporter(self, samples: int) -> Callable[[nn.Parameter, Contribution], None]:
        """Where a call with some number of samples reports.

        Args:
            samples: the number of samples.

        Returns:
            A function that takes a parameter and a contribution.
        """

        def report(parameter: nn.Parameter, contribution: Contribution) -> None:
            self.late(self)
            self.found.setdefault(samples, {}).setdefault(parameter, []).append(contribution)

        return report


class RootCall:
    """One call of the model.

    Args:
        samples: number of samples.
        iteration: where it reports.
    """

    def __init__(self, samples: int, iteration: Iteration) -> None:
        self.samples, self.iteration = samples, iteration
        self.inside_vmap = False

    @contextmanager
    def mapping(self) -> Iterator[None]:
        """A module of the model runs one sample at a time.

        Yields:
            Nothing.
        """
        self.inside_vmap = True
        try:
            yield
        finally:
            self.inside_vmap = False

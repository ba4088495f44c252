"""What came back between two backward passes, and one call of the model that reports to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn
from typing_extensions import override

from dpfix.engines.bookkeeping.contributions import Contribution
from dpfix.engines.frozen_parameters import Frozen
from dpfix.engines.iterations import Iteration
from dpfix.instrument.sharded import Shards


class LayerIteration(Iteration):
    """What came back between two backward passes.

    Attributes:
        found: contributions by parameter, by number of samples of the model's call.
        calls: how often each module was called.
    """

    def __init__(self) -> None:
        self.found: dict[int, dict[nn.Parameter, list[Contribution]]] = {}
        self.calls: dict[str, int] = {}

    @override
    def arrived(self) -> dict[int, dict[nn.Parameter, list[Contribution]]]:
        return self.found

    @property
    @override
    def begun(self) -> bool:
        return bool(self.calls or self.found)

    @override
    def clear(self) -> None:
        self.found.clear()
        self.calls.clear()


class RootCall:
    """One call of the model.

    Attributes:
        shards: the parameters of a model that is spread over processes, under which its whole ones are reported.

    Args:
        iteration: where it reports.
        late: told before it reports, since the iteration may be thought to be over by then.
    """

    def __init__(self, samples: int, iteration: LayerIteration, late: Callable[[LayerIteration], None]) -> None:
        self.samples, self.iteration, self._late = samples, iteration, late
        self.inside_vmap = False
        self.shards: Shards | None = None

    def reporter(self, samples: int) -> Callable[[nn.Parameter, Contribution], None]:
        """Where a layer call with some number of samples reports.

        Returns:
            A function that takes a parameter and a contribution.
        """
        iteration, late, shards = self.iteration, self._late, self.shards

        def report(parameter: nn.Parameter, contribution: Contribution) -> None:
            late(iteration)
            if isinstance(parameter, Frozen):
                parameter.arrived()
                return
            if shards is not None:
                parameter = shards.shard_of(parameter)
            iteration.found.setdefault(samples, {}).setdefault(parameter, []).append(contribution)

        return report

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

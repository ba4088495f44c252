"""Training on several processes: one plan, one draw and one refusal for all ranks.

Every rank has the whole dataset. All of them draw the same Poisson batch and each works on its own part of it; the clipped
sums are added up with the noise of rank 0 in ``DistributedDPOptimizer``. What reaches the parameters is what one process
would have released. Opacus gives every rank a share of the data and lets it draw there: with the same seed on all ranks,
as most scripts set it, the draws are the same positions of every share, and no longer independent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from opacus.distributed import DifferentiallyPrivateDistributedDataParallel
from torch import distributed, nn

from dpfix.errors import RankError

T = TypeVar("T")


@dataclass(frozen=True)
class _Failure:
    """What a rank tells the others when it cannot go on."""

    text: str


@dataclass(frozen=True)
class Ranks:
    """This process among those that train one model.

    Attributes:
        rank: its number; 0 adds the noise and chooses the engine.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def of(cls, module: nn.Module) -> Ranks:
        """The ranks that train a model.

        Args:
            module: the model of the call.

        Returns:
            Those of the default process group for Opacus's distributed wrapper, this process alone otherwise.
        """
        if isinstance(module, DifferentiallyPrivateDistributedDataParallel) and distributed.is_initialized():
            return cls(distributed.get_rank(), distributed.get_world_size())
        return cls()

    def exchange(self, value: T) -> list[T]:
        """Show all ranks a value, and see theirs. Every rank has to call it.

        Args:
            value: anything that can be pickled.

        Returns:
            The values in the order of the ranks.

        Raises:
            RankError: another rank has failed.
        """
        if self.size == 1:
            return [value]
        everyone: list[Any] = [None] * self.size
        distributed.all_gather_object(everyone, value)
        failed = {r: v.text for r, v in enumerate(everyone) if isinstance(v, _Failure)}
        if failed and not isinstance(value, _Failure):
            rank, text = next(iter(failed.items()))
            raise RankError(f"rank {rank} of {self.size} cannot train privately, so no rank does. It says:\n{text}")
        return everyone

    def first(self, value: T) -> T:
        """The value of rank 0.

        Args:
            value: this rank's value.

        Returns:
            What rank 0 called this with.
        """
        return self.exchange(value)[0]

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """A failure on one rank is a failure on all of them: nobody waits for a rank that has stopped.

        Yields:
            Nothing; the block may call :meth:`exchange`.

        Raises:
            RankError: another rank has failed.
        """
        try:
            yield
        except RankError:
            raise
        except Exception as error:
            self.exchange(_Failure(f"{type(error).__name__}: {error}"))
            raise
        self.exchange(None)

    def check_same(self, values: Mapping[str, Any]) -> None:
        """All ranks have to train the same model in the same way.

        Args:
            values: what has to be equal, by name.

        Raises:
            RankError: a value is not.
        """
        everyone = self.exchange(dict(values))
        for rank, other in enumerate(everyone):
            for name in everyone[0] | other:
                here, there = everyone[0].get(name, "missing"), other.get(name, "missing")
                if here != there:
                    raise RankError(
                        f"the ranks do not train the same thing: {name} is {here} on rank 0 and {there} on rank {rank}. Every "
                        "rank has to make the same call, with the same model, the whole dataset and the same arguments; load "
                        "weights before DifferentiallyPrivateDistributedDataParallel(model), which sends those of rank 0 to "
                        "the others."
                    )


ALONE = Ranks()
"""One process, as always but under Opacus's distributed wrapper."""


def fingerprint(module: nn.Module) -> dict[str, Any]:
    """Names, shapes and weights of a model, so that ranks can compare them.

    Args:
        module: the repaired model.

    Returns:
        Values by name, for :meth:`Ranks.check_same`. They do not leave the process group.
    """
    found: dict[str, Any] = {}
    for name, p in module.named_parameters():
        found[f"parameter `{name}`"] = f"{tuple(p.shape)}, {p.dtype}, {'trained' if p.requires_grad else 'frozen'}"
        found[f"the sum of parameter `{name}`"] = float(p.detach().sum(dtype=torch.float64))
    return found

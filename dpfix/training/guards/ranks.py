"""Several processes release parts of one batch."""

from __future__ import annotations

from opacus.optimizers import DPOptimizer
from typing_extensions import override

from dpfix.errors import RankError
from dpfix.training.guards.check import SCHEDULED, Check, Guarded

_COMPARED = (
    "the pass over the data_loader", "the number of its batches", "the number of accounted steps",
    "the number of states that were loaded", *SCHEDULED,
)  # fmt: skip


class RanksAgree(Check):
    """All ranks are about to release parts of one batch, clipped to one norm, and none has failed.

    Catches: ranks that are at different batches or have different schedulers, and a step that is refused on one rank only.
    Costs: nothing on one process; two exchanges of eight numbers per release otherwise.
    """

    def __init__(self, guarded: Guarded) -> None:
        self._guarded = guarded
        self.needed = guarded.ranks.size > 1

    @override
    def before_noise(self, optimizer: DPOptimizer) -> None:
        guarded = self._guarded
        draw = guarded.progress.draw
        seed, number = (draw.of.seed, draw.number) if draw else (0, guarded.progress.released)
        settings = [float(getattr(optimizer, name)) for name in SCHEDULED]
        mine = [0.0, seed, number, guarded.accounting.steps, guarded.accounting.loads, *settings]
        everyone = self._exchange(mine, optimizer)
        for rank, values in enumerate(everyone):
            for name, here, there in zip(_COMPARED, everyone[0][1:], values[1:], strict=True):
                if here != there:
                    raise RankError(
                        f"the ranks do not make the same step: {name} is {here:g} on rank 0 and {there:g} on rank {rank}.",
                        "Nothing was released.",
                        "Every rank has to begin the same passes over the data_loader, to make a step for every batch of it, "
                        "and to use schedulers and checkpoints as the others do.",
                        path=name,
                    )

    @override
    def noised(self, optimizer: DPOptimizer) -> None:
        self._exchange([0.0] * (1 + len(_COMPARED)), optimizer)

    def _exchange(self, mine: list[float], optimizer: DPOptimizer) -> list[list[float]]:
        everyone = self._guarded.ranks.exchange_numbers(mine, optimizer.params[0].device)
        failed = [rank for rank, values in enumerate(everyone) if values[0]]
        if failed:
            raise RankError(
                f"optimizer.step() on rank {failed[0]} has failed, as its own message says, so this step is released on no rank.",
                path="optimizer",
            )
        return everyone

    def tell_others(self, optimizer: DPOptimizer, error: Exception) -> None:
        """A step that fails here is released nowhere."""
        if self.needed and not isinstance(error, RankError):  # the others have that one too
            self._guarded.ranks.exchange_numbers([1.0] * (1 + len(_COMPARED)), optimizer.params[0].device)

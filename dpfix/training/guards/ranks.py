"""Several processes release parts of one batch."""

from __future__ import annotations

from typing import Any

import torch
from opacus.optimizers import DPOptimizer
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from dpfix.errors import MisuseError, RankError
from dpfix.instrument.source import warn_user
from dpfix.training.guards.check import SCHEDULED, Check, Guarded

_COMPARED = (
    "the pass over the data_loader", "the number of its batches", "the number of accounted steps",
    "the number of states that were loaded", *SCHEDULED,
)  # fmt: skip
_NUMBERS = 1 + len(_COMPARED) + 1
"""Whether the rank has failed, what is compared, and how many samples the rank takes at a time."""


class RanksAgree(Check):
    """All ranks are about to release parts of one batch, clipped to one norm, and none has failed.

    Catches: ranks that are at different batches or have different schedulers, and a step that is refused on one rank only.
    Costs: nothing on one process; two exchanges of nine numbers per release otherwise, and two more where parameters are
    spread over the ranks: which looks at the step, and none that has failed takes part in adding up the sums.
    """

    def __init__(self, guarded: Guarded) -> None:
        self._guarded = guarded
        self.needed = guarded.ranks.size > 1 or guarded.ranks.sharded

    @override
    def collected(self, optimizer: DPOptimizer, counts: list[int], drawn: int | None) -> None:
        if self._guarded.shards is not None:
            _exchanged(self._guarded, optimizer)

    @override
    def before_noise(self, optimizer: DPOptimizer) -> None:
        guarded = self._guarded
        draw = guarded.progress.draw
        seed, number = (draw.of.seed, draw.number) if draw else (0, guarded.progress.released)
        settings = [float(getattr(optimizer, name)) for name in SCHEDULED]
        limit = 0 if guarded.ledger is None else guarded.ledger.limit or 0
        mine = [seed, number, guarded.accounting.steps, guarded.accounting.loads, *settings, limit]
        everyone = _exchanged(guarded, optimizer, *mine)
        for rank, values in enumerate(everyone):
            for name, here, there in zip(_COMPARED, everyone[0][1:-1], values[1:-1], strict=True):
                if here != there:
                    raise RankError(
                        f"the ranks do not make the same step: {name} is {here:g} on rank 0 and {there:g} on rank {rank}.",
                        "Nothing was released.",
                        "Every rank has to begin the same passes over the data_loader, to make a step for every batch of it, "
                        "and to use schedulers and checkpoints as the others do.",
                        path=name,
                    )
        limits = [int(values[-1]) for values in everyone if values[-1]]
        if limits and guarded.ledger is not None:  # memory ran out on one rank: none takes more at a time than that one
            guarded.ledger.limit_to(min(limits))

    @override
    def noised(self, optimizer: DPOptimizer) -> None:
        _exchanged(self._guarded, optimizer)

    def tell_others(self, optimizer: DPOptimizer, error: Exception) -> None:
        """A step that fails here is released nowhere."""
        if self.needed and not isinstance(error, RankError):  # the others have that one too
            self._guarded.ranks.exchange_numbers([1.0] * _NUMBERS, optimizer.params[0].device)


def any_looks(guarded: Guarded, optimizer: DPOptimizer, *, looks: bool) -> bool:
    """Whether any rank looks at the step that all are about to make; every rank has to call it.

    Args:
        looks: whether this one does.

    Returns:
        Whether one does.

    Raises:
        RankError: a rank has failed.
    """
    return any(values[1] for values in _exchanged(guarded, optimizer, float(looks)))


def _exchanged(guarded: Guarded, optimizer: DPOptimizer, *mine: float) -> list[list[float]]:
    """What every rank says in the step, after a number that says whether it has failed: always as many numbers."""
    filled = [0.0, *mine, *[0.0] * (_NUMBERS - 1 - len(mine))]
    everyone = guarded.ranks.exchange_numbers(filled, optimizer.params[0].device)
    failed = [rank for rank, values in enumerate(everyone) if values[0]]
    if failed:
        raise RankError(
            f"optimizer.step() on rank {failed[0]} has failed, as its own message says, so this step is released on no rank.",
            path="optimizer",
        )
    return everyone


class WrappedBefore(Check):
    """Torch's ``DistributedDataParallel`` is put around the model before the call, not around the model in private training.

    Catches: a wrapper that is made afterwards, also by accelerate's ``prepare``: each rank would draw, add noise and account by
    itself and exchange nothing, and all of them would release a model. Costs: one comparison in a call of the model.
    """

    def __init__(self, guarded: Guarded) -> None:
        self._of = id(guarded.module)  # a copy of the model has the hook, too, and is in no training
        self._hook = guarded.module.register_forward_pre_hook(self._look)

    def _look(self, module: Any, args: Any) -> None:
        around = DistributedDataParallel._get_active_ddp_module()
        if (
            around is not None
            and id(module) == self._of
            and torch.is_grad_enabled()
            and module.training
            and distributed.get_world_size(around.process_group) > 1
        ):
            raise MisuseError(
                f"the model is called by a {type(around).__name__} that was put around it after the call.",
                "Nothing is exchanged: each rank draws batches, adds noise and accounts by itself, and trains another model.",
                "Wrap the model first, and pass the wrapper to make_private_safe on every rank. With accelerate on several "
                "processes, prepare the model before the call, and leave the data_loader out of prepare.",
                path="module",
            )

    @override
    def detach(self) -> None:
        self._hook.remove()


def number_of_ranks(optimizer: Any) -> int:
    """How many processes train with an optimizer; 1 for one that is not private."""
    guard = getattr(optimizer, "guard", None)
    return 1 if guard is None else guard.guarded.ranks.size


def compare_ranks(saved: int | None, optimizer: Any) -> None:
    """Warn where a checkpoint goes on with another number of ranks.

    Args:
        saved: their number when it was saved; ``None`` in a file that does not say it.
        optimizer: goes on.
    """
    here = number_of_ranks(optimizer)
    if saved is not None and saved != here:
        warn_user(
            f"checkpoint: it was saved by a training on {_in_words(saved)}, and goes on with {_in_words(here)}. Batches, "
            "clipping, noise and accounting are those of one training; random layers, and who works on which sample, are not."
        )


def _in_words(ranks: int) -> str:
    return f"{ranks} rank{'s' if ranks > 1 else ''}"

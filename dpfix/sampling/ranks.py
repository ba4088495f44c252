"""Training on several processes: one plan, one draw and one refusal for all ranks.

Every rank has the whole dataset. All of them draw the same Poisson batch and each works on its own part of it; the clipped
sums are added up with the noise of rank 0 in ``DistributedDPOptimizer``. What reaches the parameters is what one process
would have released. Opacus gives every rank a share of the data and lets it draw there: with the same seed on all ranks,
as most scripts set it, the draws are the same positions of every share, and no longer independent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from opacus.distributed import DifferentiallyPrivateDistributedDataParallel
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only
from typing_extensions import override

from dpfix.errors import MisuseError, RankError
from dpfix.instrument.sharded import is_sharded

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
        sharded: whether each has its own part of every parameter, and adds the noise to it.
    """

    rank: int = 0
    size: int = 1
    sharded: bool = False

    @classmethod
    def of(cls, module: nn.Module) -> Ranks:
        """The ranks that train a model.

        Returns:
            Those of the default process group for Opacus's distributed wrapper, for torch's and for a model on which
            ``fully_shard`` was called, this process alone otherwise.
        """
        sharded = is_sharded(module)
        wrapped = isinstance(module, DifferentiallyPrivateDistributedDataParallel) or in_default_group(module)
        if (wrapped or sharded) and distributed.is_initialized():
            return cls(distributed.get_rank(), distributed.get_world_size(), sharded)
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
        with all_answer():
            distributed.all_gather_object(everyone, value)
        failed = {r: v.text for r, v in enumerate(everyone) if isinstance(v, _Failure)}
        if failed and not isinstance(value, _Failure):
            rank, text = next(iter(failed.items()))
            fact = f"rank {rank} of {self.size} cannot train privately, so no rank does. It says:\n{text}"
            raise RankError(fact, path=f"rank {rank}")
        return everyone

    def exchange_numbers(self, values: Sequence[float], device: torch.device) -> list[list[float]]:
        """As :meth:`exchange`, for a few numbers at every step.

        Args:
            values: as many on every rank.
            device: where the parameters are, so that the back end of the process group can send them.

        Returns:
            The values in the order of the ranks.
        """
        mine = torch.tensor(values, dtype=torch.float64, device=device)
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        with all_answer():
            distributed.all_gather(everyone, mine)
        return [one.tolist() for one in everyone]

    def first(self, value: T) -> T:
        """What rank 0 called this with; every rank has to call it."""
        return self.exchange(value)[0]

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """A failure on this rank is one on all of them: they learn of it where they next exchange something.

        Yields:
            Nothing.
        """
        try:
            yield
        except Exception as error:
            if not isinstance(error, RankError):  # the others have that one too
                self.exchange(_Failure(f"{type(error).__name__}: {error}"))
            raise

    def check_same(self, values: Mapping[str, Any]) -> None:
        """All ranks have to train the same model in the same way.

        Args:
            values: what has to be equal, by name; a name that a rank does not have is not compared. Bytes, which may be
                digests of data, are not shown to anybody.

        Raises:
            RankError: a value is not.
        """
        everyone = self.exchange(dict(values))
        for rank, other in enumerate(everyone):
            for name in (n for n in everyone[0] if n in other):
                here, there = everyone[0][name], other[name]
                if here != there:
                    what = "differs" if isinstance(here, bytes) else f"is {here} on rank 0 and {there}"
                    raise RankError(
                        f"the ranks do not train the same thing: {name} {what} on rank {rank}.",
                        "Every rank has to make the same call, with the same model, the whole dataset and the same arguments;",
                        "load weights before the distributed wrapper is made, which sends those of rank 0 to the others.",
                        path=name,
                    )


ALONE = Ranks()
"""One process, as always but under a distributed wrapper."""


@contextmanager
def all_answer() -> Iterator[None]:
    """While the ranks exchange something: one that has ended, or is stuck, ends the others.

    Yields:
        Nothing.

    Raises:
        RankError: a rank does not answer.
    """
    try:
        yield
    except RuntimeError as error:  # of the back end; torch's DistBackendError is one
        first = str(error).strip().partition("\n")[0]
        raise RankError(
            f"another rank no longer answers, so this one stops and releases nothing more. The back end says: {first}",
            "That rank has ended, or has not come to this exchange within the timeout of the process group.",
            "Its own output says why. Start all ranks again, from the last checkpoint if there is one; "
            "torch.distributed.init_process_group(timeout=...) sets how long a rank is waited for.",
            path="torch.distributed",
        ) from error


def in_default_group(module: nn.Module) -> bool:
    """Whether this is torch's ``DistributedDataParallel``, and over all processes."""
    return isinstance(module, DistributedDataParallel) and module.process_group is distributed.group.WORLD


class TakenOver(DifferentiallyPrivateDistributedDataParallel):
    """What torch's ``DistributedDataParallel`` becomes in private training: the same object, exchanging no gradients.

    The script goes on with the object that it has: ``module``, ``state_dict`` and inputs that are moved to the device are as
    before, and what a loop says about the exchange has no effect, since the optimizer makes it once per batch.
    """

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = vars(self)
        if given.get("device_ids"):
            device = torch.device(given["device_type"], given["device_ids"][0])
            args, kwargs = tree_map_only(torch.Tensor, lambda t: t.to(device, non_blocking=True), (args, kwargs))
        return self.module(*args, **kwargs)

    def no_sync(self) -> AbstractContextManager[None]:
        """Nothing is exchanged during ``backward``, in this block or outside."""
        return nullcontext()

    def join(self, *_: Any, **__: Any) -> AbstractContextManager[None]:
        """All ranks have equally many batches."""
        return nullcontext()

    def register_comm_hook(self, *_: Any, **__: Any) -> None:
        """There is no exchange for it.

        Raises:
            MisuseError: always.
        """
        raise MisuseError(
            "register_comm_hook was called on a model in private training, whose gradients are not exchanged.",
            "Clipped sums are added up in optimizer.step(), once per batch.",
            "Leave the call out.",
            path="module",
        )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in (*_EXCHANGE, "process_group")}


_EXCHANGE = ("reducer", "logger")
"""Attributes of torch's wrapper that exchange gradients when ``backward`` reaches the parameters."""


def forget_forward(module: nn.Module) -> None:
    """Torch's wrapper no longer waits for the backward pass of an earlier forward pass, and exchanges nothing until the next."""
    reset = getattr(vars(module).get("reducer"), "_reset_state", None)  # not in every torch
    if reset is not None:
        reset()


def end_exchange(model: Any) -> None:
    """Take the exchange of gradients off the parameters of a wrapper that was taken over, which nobody can undo.

    Args:
        model: what a call was given; the wrapper may stand inside another one.
    """
    modules = model.modules() if isinstance(model, nn.Module) else ()
    for module in [m for m in modules if isinstance(m, TakenOver) and "reducer" in vars(m)]:
        vars(module)["reducer"]._remove_autograd_hooks()
        for hook in vars(module).get("_accum_grad_hooks", ()):  # of torch's reducer for compiled backward passes
            hook.remove()
        for name in _EXCHANGE:
            vars(module).pop(name, None)


def new_seed(generator: torch.Generator) -> int:
    """A seed of 53 bits, which a float holds exactly.

    Args:
        generator: the source.

    Returns:
        The seed.
    """
    return int(torch.randint(2**53, (), generator=generator))


def fingerprint(module: nn.Module) -> dict[str, str | bytes]:
    """Parameters and buffers of a model, so that ranks can compare them.

    Returns:
        Shape, type and a digest of the values by name, for :meth:`Ranks.check_same`.
    """
    named = {f"parameter `{n}`": p for n, p in module.named_parameters()}
    named |= {f"buffer `{n}`": b for n, b in module.named_buffers()}
    found: dict[str, str | bytes] = {"the parameters and buffers": ", ".join(named)}
    for name, t in named.items():
        found[name] = f"{tuple(t.shape)}, {t.dtype}, {'trained' if t.requires_grad else 'not trained'}"
        found[f"the content of {name}"] = digest(t)
    return found


def digest(tensor: torch.Tensor) -> bytes:
    """A few bytes (a part of a SHA-256) that tell the values of tensors apart, bit by bit."""
    flat = tensor.detach().as_subclass(torch.Tensor).cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(flat.numpy().tobytes()).digest()[:12]

"""What a check is, and what it can look at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from opacus.optimizers import DPOptimizer
from torch import nn

from dpfix.engines.base import Handle
from dpfix.engines.bookkeeping.contributions import full_precision
from dpfix.instrument import pytree
from dpfix.instrument.sharded import Shards
from dpfix.plan import Plan
from dpfix.sampling.draw import Draw
from dpfix.sampling.ledger import DrawLedger
from dpfix.sampling.own_loader import Deliveries
from dpfix.sampling.ranks import ALONE, Ranks
from dpfix.training.accounting import Accounting
from dpfix.weights.copies import plain_copy

SCHEDULED = ("noise_multiplier", "max_grad_norm", "expected_batch_size")
"""Attributes of a private optimizer that schedulers, and adaptive clipping, change while training."""


@dataclass
class Progress:
    """How far the training has come.

    Attributes:
        partial: samples of the present logical batch that earlier physical batches of a ``BatchMemoryManager`` brought.
        released: logical batches that were released.
        draw: what the private loader delivered of the step that is being made, or was made last.
    """

    partial: int = 0
    released: int = 0
    draw: Draw | None = None


@dataclass(frozen=True)
class Guarded:
    """One private training, as its checks see it.

    Attributes:
        module: the plain model.
        plan: what was audited.
        parameters: the trainable parameters by name.
        handle: the engine at work.
        accounting: counts the steps.
        ledger: what the private loader drew; ``None`` without Poisson sampling.
        own_loader: what the script's own loader hands out; ``None`` with Poisson sampling.
        ranks: the processes that train together.
        shards: the parameters of a model that is spread over processes; ``None`` for others.
        progress: how far the training has come.
    """

    module: nn.Module
    plan: Plan
    parameters: Mapping[str, nn.Parameter]
    handle: Handle
    accounting: Accounting
    ledger: DrawLedger | None = None
    ranks: Ranks = ALONE
    own_loader: Deliveries | None = None
    shards: Shards | None = None
    progress: Progress = field(default_factory=Progress)

    @property
    def name(self) -> str:
        """The model's class, for messages."""
        return type(self.module).__name__

    @property
    def stands_in(self) -> bool:
        """Whether the batch is that of an empty draw, which stands in with one person of any number of rows."""
        return self.ledger is not None and self.plan.followed_by_row and self.ledger.pending() == 0

    def plain_copy(self) -> nn.Module:
        """A copy of the model as it is, without anything of private training."""
        if self.shards is None:
            return plain_copy(self.module)
        copied = plain_copy(self.module, self.shards.whole())
        if self.shards.mixed:
            copied.register_forward_pre_hook(_in_full_precision, with_kwargs=True)
        return copied

    def own_sums(self) -> dict[str, torch.Tensor]:
        """The clipped sum of what this process works on, by parameter name."""
        if self.shards is not None:
            return self.shards.own
        return {n: p.summed_grad.detach() for n, p in self.parameters.items() if p.summed_grad is not None}  # type: ignore[attr-defined]

    def forget_sum(self) -> None:
        """Drop the clipped sum; a draw of which a part is lost in this way cannot be released."""
        progress = self.progress
        if progress.partial and progress.draw is not None:
            progress.draw.whole.discarded = True
        for p in self.parameters.values():
            p.summed_grad = None  # type: ignore[attr-defined]


def _in_full_precision(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """What FSDP has turned into half precision, for a model that is not spread."""

    def turned(_: Any, leaf: Any) -> Any:
        return full_precision(leaf) if isinstance(leaf, torch.Tensor) else leaf

    return pytree.map_leaves(turned, args), pytree.map_leaves(turned, kwargs)


class Check:
    """Something that has to hold on every real step.

    A check overrides the moments at which it looks, in this order; the others cost nothing. It refuses a step by raising
    a :class:`~dpfix.errors.MisuseError` before any parameter moves. With a ``BatchMemoryManager`` all moments but
    :meth:`before_noise` and :meth:`noised` come once per physical batch.

    Attributes:
        needed: whether there is anything to look at in this training; if not, the check is asked at no step.
    """

    needed: bool = True

    def cleared(self) -> None:
        """``zero_grad`` was called."""

    def before_step(self, optimizer: DPOptimizer) -> None:
        """The private optimizer is about to step; the engine has not been asked for anything yet."""

    def collected(self, optimizer: DPOptimizer, counts: list[int], drawn: int | None) -> None:
        """The engine has said what arrived.

        Args:
            optimizer: the private optimizer.
            counts: number of samples of every backward pass since the last step.
            drawn: number of samples in the draw that the loop works on, or in the part of it that a ``BatchMemoryManager``
                has delivered; ``None`` if nothing was drawn, or without Poisson sampling.
        """

    def summed(self, norms: torch.Tensor | None) -> None:
        """The clipped sum is there, without noise.

        Args:
            norms: norms of the samples' gradients, where the engine has clipped and knows them.
        """

    def before_noise(self, optimizer: DPOptimizer) -> None:
        """The logical batch is complete and about to be released."""

    def noised(self, optimizer: DPOptimizer) -> None:
        """Noise and scaling are done, nothing is accounted, and the script's step hook has not run."""

    def after_step(self, released: bool) -> None:
        """A physical batch was processed.

        Args:
            released: whether the logical batch is complete.
        """

    def make_way(self) -> None:
        """Another guard of the same training takes the place of this one: take everything off model and parameters."""
        self.detach()

    def take_over(self, earlier: Any) -> None:
        """Go on with what the check of the same kind in the guard so far knows about the training."""

    def detach(self) -> None:
        """The training is over: take everything off model and parameters."""

"""One call: the user's objects and what is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from dpfix.instrument.batch_norm_calls import Mixing
from dpfix.plan import Plan
from dpfix.sampling.ranks import ALONE, Ranks
from dpfix.sampling.rate import accounted_rate
from dpfix.scan.options import PerformanceOptions, PrivacyOptions
from dpfix.scan.scan import Scan


@dataclass(frozen=True)
class Request:
    """One call: the user's objects and what is asked for.

    Attributes:
        module: the model.
        optimizer: the optimizer.
        data_loader: the loader.
        criterion: the loop's loss function, if given.
        training_step: from batch to loss, if given.
        privacy: what decides what is released.
        performance: how that is computed.
        ranks: the processes that make this call together.
        handed_over: whether Opacus has already handed over.
        so_far: how the model was trained in what the loop has done until then.
        mixing: what a run has shown of modules that call ``batch_norm``, by path.
    """

    module: nn.Module
    optimizer: Optimizer
    data_loader: DataLoader[Any]
    criterion: Callable[..., Any] | None
    training_step: Callable[[nn.Module, Any], torch.Tensor] | None
    privacy: PrivacyOptions
    performance: PerformanceOptions
    ranks: Ranks = ALONE
    handed_over: bool = False
    so_far: Plan | None = None
    mixing: Mapping[str, Mixing] = field(default_factory=dict)

    @property
    def scan(self) -> Scan:
        """The objects as the rules see them."""
        known = self.ranks if self.ranks.sharded else None
        return Scan(self.module, self.optimizer, self.data_loader, self.privacy, self.performance, self.mixing, known)

    @property
    def rate(self) -> float:
        """The rate with which a release is accounted."""
        return accounted_rate(self.data_loader, self.privacy.sampling)

    @property
    def views(self) -> int:
        """Views of every sample."""
        return 1 if self.privacy.augmentation is None else self.privacy.augmentation.k

"""Turns the VALID and INVALID factories of the rules into complete calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.utils.data import DataLoader, TensorDataset

TAKEN = frozenset({"module", "optimizer", "data_loader", "criterion", "grad_sample_mode", "integers"})
"""What a case may give; ``integers`` makes the inputs whole numbers below it."""


@dataclass
class Example:
    """One complete call."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    data_loader: DataLoader[Any]
    mode: str
    criterion: Any

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for ``make_private_safe``."""
        return {
            "module": self.module,
            "optimizer": self.optimizer,
            "data_loader": self.data_loader,
            "noise_multiplier": 1.0,
            "max_grad_norm": 1.0,
            "criterion": self.criterion,
            "grad_sample_mode": self.mode,
        }


def example(factory: Callable[[], dict[str, Any]]) -> Example:
    """Complete what a factory gives: inputs that fit the model's first layer, an optimizer, a loader."""
    given = factory()
    assert given.keys() <= TAKEN, f"a case may give {sorted(TAKEN)}"
    module = given["module"]
    x = _inputs(module, given.get("integers"))
    _materialise(module, x)
    loader = given.get("data_loader")
    if loader is None:
        loader = DataLoader(TensorDataset(x, torch.arange(len(x)) % 3), batch_size=4)
    optimizer = given.get("optimizer")
    if optimizer is None:
        optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad])
    mode, criterion = given.get("grad_sample_mode", "auto"), given.get("criterion", nn.CrossEntropyLoss())
    return Example(module, optimizer, loader, mode, criterion)


def _inputs(module: nn.Module, integers: int | None) -> torch.Tensor:
    if integers is not None:
        return torch.randint(0, integers, (12, 5))
    first = next(module.parameters(), None)
    shape = (12, 3, 8, 8) if first is not None and first.dim() == 4 else (12, 6)
    kind = torch.float32 if first is None else first.dtype
    return torch.randn(shape, dtype=kind)


def _materialise(module: nn.Module, x: torch.Tensor) -> None:
    """Let lazy layers create their parameters, in evaluation mode so that no statistic moves."""
    if not any(isinstance(p, UninitializedParameter) for p in module.parameters()):
        return
    flags = {m: m.training for m in module.modules()}
    module.eval()
    with torch.no_grad():
        module(x[:2])
    for child, flag in flags.items():
        child.training = flag

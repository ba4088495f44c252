"""A model and its loader through plain Opacus, and through dpfix."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from opacus import PrivacyEngine
from torch import Tensor, nn
from torch.utils.data import DataLoader

import dpfix

FAILURES = (
    AssertionError, AttributeError, IndexError, KeyError, NotImplementedError, OSError, RuntimeError, TypeError, ValueError
)  # fmt: skip
"""What ends a training with plain Opacus."""

Step = Callable[[nn.Module, Any], Tensor]
"""A training step: from model and batch to the loss."""


@dataclass
class Made:
    """What one of the two libraries made of a model.

    Attributes:
        model: the private model.
        optimizer: the private optimizer.
        loader: the private loader.
        reference: returns the model that is trained, without anything private on it.
        engine: how per-sample gradients are computed.
        accountant: the accountant.
        report: what dpfix reports.
    """

    model: Any
    optimizer: Any
    loader: Any
    reference: Callable[[], nn.Module]
    engine: str
    accountant: Any
    report: Any = None


def sgd(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)


def with_opacus(model: nn.Module, loader: DataLoader[Any], lr: float, **arguments: Any) -> Made:
    """Opacus as its documentation has it, with a model that was through ``ModuleValidator.fix``."""
    plain = copy.deepcopy(model)
    engine = PrivacyEngine()
    made = engine.make_private(
        module=model, optimizer=sgd(model, lr), data_loader=loader, max_grad_norm=1.0, **arguments
    )
    return Made(*made, lambda: plain, arguments.get("grad_sample_mode", "hooks"), engine.accountant)


def with_dpfix(model: nn.Module, loader: DataLoader[Any], lr: float, step: Step, **arguments: Any) -> Made:
    """The same objects through dpfix."""
    made = dpfix.make_private_safe(
        module=model, optimizer=sgd(model, lr), data_loader=loader, max_grad_norm=1.0, training_step=step, **arguments
    )
    reference = made[0].to_standard_module
    return Made(*made, reference, made.plan.engine, made.privacy_engine.accountant, made.report)

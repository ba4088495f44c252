"""Recurrent and attention layers, which Opacus's hooks can only train after replacing them.

What: ``nn.LSTM``, ``nn.GRU`` and ``nn.MultiheadAttention``.

Why: their weights are used inside fused kernels, where hooks see nothing. Opacus replaces them (DPLSTM, DPGRU,
DPMultiheadAttention); the replacement renames parameters and is not always equal (attention with ``batch_first`` and
several heads, dropout between recurrent layers, ``proj_size``).

Example: ``nn.TransformerEncoderLayer``.

Use instead: leave the layer. dpfix's own engines take per-sample gradients of it as torch computes it, with the
original parameters and state-dict keys.

Fix safety: nothing is changed with ``grad_sample_mode="auto"``. When an Opacus mode is asked for by name, Opacus's
replacement is used if its output on a probe equals the original's, and refused if not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from opacus.validators import ModuleValidator
from torch import nn

from dpfix.errors import ModelError
from dpfix.report.finding import Finding, Fixability, Severity
from dpfix.weights.equivalence import verify_equivalence

if TYPE_CHECKING:
    from dpfix.scan.scan import Scan

CODE = "DPF007"
TITLE = "a layer that Opacus's hooks cannot see into"
ERROR = ModelError

_KINDS = (nn.LSTM, nn.GRU, nn.MultiheadAttention)


def find(scan: Scan) -> Iterator[Finding]:
    """Every trainable LSTM, GRU and MultiheadAttention.

    Args:
        scan: the objects of the call.

    Yields:
        Advice with ``"auto"``; a repair or a refusal when an Opacus mode was asked for.
    """
    for path, module in scan.modules(*_KINDS):
        if not any(p.requires_grad for p in module.parameters()):
            continue
        common = {"code": CODE, "path": path, "why": "its weights are used inside fused kernels."}
        if not scan.performance.opacus_only:
            yield Finding(
                **common,
                severity=Severity.ADVICE,
                fixability=Fixability.NOTHING,
                fact=f"{scan.place(path)} cannot be trained by Opacus's hooks.",
                fix="kept as it is, with its own parameters; an engine of dpfix trains it",
            )
            continue
        difference = _difference(module)
        equal = difference is not None and difference <= 1e-5
        told = "cannot be built" if difference is None else f"differs by {difference:.1e}"
        yield Finding(
            **common,
            severity=Severity.BLOCKS_TRAINING,
            fixability=Fixability.EXACT if equal else Fixability.REFUSED,
            fact=f"{scan.place(path)} has to be replaced for grad_sample_mode='{scan.performance.grad_sample_mode}'.",
            fix=f"Opacus's replacement; largest difference on a probe {difference:.1e}" if equal else "",
            help="" if equal else f"Opacus's replacement {told}; leave grad_sample_mode at 'auto'.",
        )


def fix(module: nn.Module, scan: Scan) -> nn.Module:
    """Opacus's replacement, without going through pickle.

    Args:
        module: an LSTM, GRU or MultiheadAttention.
        scan: the objects of the call; not needed.

    Returns:
        The replacement on the same device, with the same dtype and ``requires_grad``.
    """
    return _opacus_replacement(module)


def _opacus_replacement(module: nn.Module) -> nn.Module:
    kind = next(k for k in _KINDS if isinstance(module, k))
    with torch.random.fork_rng(devices=[]):
        new = ModuleValidator.FIXERS[kind](module)
    first = next(module.parameters())
    return new.to(device=first.device, dtype=first.dtype)


def _difference(module: nn.Module) -> float | None:
    frozen = any(not p.requires_grad for p in module.parameters())
    if type(module) not in _KINDS or frozen or getattr(module, "dropout", 0):
        return None
    try:
        # Only outputs can be compared: the replacement's layers have other names.
        report = verify_equivalence(module, _opacus_replacement(module), _inputs(module), mapping={"": ""})
    except (RuntimeError, ValueError, TypeError, AssertionError, NotImplementedError):
        return None
    return report.max_difference if math.isfinite(report.max_difference) else None


def _inputs(module: nn.Module) -> tuple[torch.Tensor, ...]:
    first = next(module.parameters())
    generator = torch.Generator().manual_seed(0)

    def draw(width: int) -> torch.Tensor:
        return torch.randn(3, 4, width, generator=generator).to(first)

    if isinstance(module, nn.MultiheadAttention):
        return draw(module.embed_dim), draw(module.kdim), draw(module.vdim)
    assert isinstance(module, nn.RNNBase)
    return (draw(module.input_size),)


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(6, 5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(x[:, None])[0][:, -1])


def _recurrent(**options: Any) -> dict[str, Any]:
    return {"module": _Recurrent(), **options}


VALID = (lambda: {"module": nn.Sequential(nn.Linear(6, 3))},)
INVALID = (lambda: _recurrent(), lambda: _recurrent(grad_sample_mode="hooks"))

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from opacus.validators import ModuleValidator
from torch import nn
from typing_extensions import override

from dpfix.errors import USER_CODE_ERRORS
from dpfix.report.finding import Finding, Fixability, Severity
from dpfix.rules.rule import Rule
from dpfix.scan.scan import Scan
from dpfix.weights.equivalence import verify_equivalence

_KINDS = (nn.LSTM, nn.GRU, nn.MultiheadAttention)


class Replaceable(Rule):
    """Recurrent and attention layers, which Opacus's hooks can only train after replacing them.

    What: ``nn.LSTM``, ``nn.GRU`` and ``nn.MultiheadAttention``.

    Why: their weights are used inside fused kernels, where hooks see nothing. Opacus replaces them (DPLSTM, DPGRU,
    DPMultiheadAttention); the replacement renames parameters and is not always equal (attention with ``batch_first`` and
    several heads, dropout between recurrent layers, ``proj_size``).

    Example: ``nn.TransformerEncoderLayer``.

    Use instead: leave the layer. dpfix's own engines take per-sample gradients of it as torch computes it, with the
    original parameters and state-dict keys.
    """

    title = "a layer that Opacus's hooks cannot see into"
    severity = Severity.BLOCKS_TRAINING
    outcomes = {
        Fixability.NOTHING: 'with ``grad_sample_mode="auto"``: nothing is changed.',
        Fixability.EXACT: "when an Opacus mode is asked for by name, and the output of Opacus's replacement on a probe "
        "equals the original's: the replacement is used.",
        Fixability.REFUSED: "when an Opacus mode is asked for by name, and its replacement differs or cannot be built.",
    }

    @override
    def find(self, scan: Scan) -> Iterator[Finding]:
        why = "its weights are used inside fused kernels."
        for path, module in scan.modules(*_KINDS):
            if not any(p.requires_grad for p in module.parameters()):
                continue
            if not scan.performance.opacus_only:
                yield self.finding(
                    Fixability.NOTHING,
                    f"{scan.place(path)} cannot be trained by Opacus's hooks.",
                    why,
                    fix="kept as it is, with its own parameters; an engine of dpfix trains it",
                    path=path,
                )
                continue
            difference = _difference(module)
            equal = difference is not None and difference <= 1e-5
            told = "cannot be built" if difference is None else f"differs by {difference:.1e}"
            yield self.finding(
                Fixability.EXACT if equal else Fixability.REFUSED,
                f"{scan.place(path)} has to be replaced for grad_sample_mode='{scan.performance.grad_sample_mode}'.",
                why,
                fix=f"Opacus's replacement; largest difference on a probe {difference:.1e}" if equal else "",
                help="" if equal else f"Opacus's replacement {told}; leave grad_sample_mode at 'auto'.",
                path=path,
            )

    @override
    def fix(self, module: nn.Module, scan: Scan) -> nn.Module:
        return _opacus_replacement(module)

    VALID = (lambda: {"module": nn.Sequential(nn.Linear(6, 3))},)
    INVALID = (
        lambda: {"module": _Recurrent()},
        lambda: {"module": _Recurrent(), "grad_sample_mode": "hooks"},
        lambda: {"module": _Recurrent(num_layers=2, dropout=0.1), "grad_sample_mode": "hooks"},
    )


def _opacus_replacement(module: nn.Module) -> nn.Module:
    """Opacus's layer, without going through pickle: same device, dtype and ``requires_grad``."""
    kind = next(k for k in _KINDS if isinstance(module, k))
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
    except USER_CODE_ERRORS:
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
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.rnn = nn.LSTM(6, 5, batch_first=True, **options)
        self.head = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(x[:, None])[0][:, -1])

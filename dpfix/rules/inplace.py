from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from dpfix.errors import USER_CODE_ERRORS
from dpfix.report.finding import Finding, Fixability, Severity
from dpfix.rules.rule import Rule
from dpfix.scan.scan import Scan
from dpfix.weights.copies import plain_copy
from dpfix.weights.equivalence import EquivalenceReport, verify_equivalence


class InPlace(Rule):
    """In-place activations and dropouts overwrite what a hook on the layer before still needs.

    What: any module with ``inplace=True``: ReLU, ELU, LeakyReLU, SiLU, Dropout, and users' own.

    Why bad: Opacus's backward hooks hand out views; modifying one in place raises ``Output 0 of BackwardHookFunction is a
    view and is being modified inplace`` in the middle of the forward pass (Opacus issue #671).

    Example: ``nn.ELU(inplace=True)`` in MONAI's VNet.

    Use instead: ``inplace=False``.
    """

    title = "a module works in place"
    severity = Severity.BLOCKS_TRAINING
    sets_attributes = True
    outcomes = {
        Fixability.EXACT: "the same values go into a new tensor; the report cites the largest difference of the outputs "
        "on a probe, in both modes.",
        Fixability.CHANGES_MODEL: "a class of which that cannot be shown.",
    }

    @override
    def find(self, scan: Scan) -> Iterator[Finding]:
        shown: dict[str, EquivalenceReport | None] = {}
        for path, module in scan.modules():
            if getattr(module, "inplace", False) is not True:
                continue
            alike = repr(module) if type(module).__module__.startswith("torch.nn.modules.") else path
            if alike not in shown:
                shown[alike] = _shown(module)
            report = shown[alike]
            yield self.finding(
                Fixability.EXACT if report else Fixability.CHANGES_MODEL,
                f"{scan.place(path)} works in place.",
                "it overwrites the output of the layer before it, which per-sample hooks still need.",
                fix=f"inplace=False; {_told(report)}",
                path=path,
            )

    @override
    def fix(self, module: nn.Module, scan: Scan) -> Mapping[str, Any]:
        return {"inplace": False}

    VALID = (lambda: _model(nn.ReLU()),)
    INVALID = (
        lambda: _model(nn.ReLU(inplace=True)),
        lambda: _model(nn.ELU(inplace=True), nn.Dropout(0.1, inplace=True)),
        lambda: _model(_EightFeatures()),
    )


_SHAPES = ((4, 4), (4, 4, 4), (4,), ())
"""Positions behind the channels of a probe; the first that a layer takes is used."""


def _shown(module: nn.Module) -> EquivalenceReport | None:
    """The module compared with itself out of place, or ``None`` if it takes none of the probes."""
    other = plain_copy(module)
    other.inplace = False  # type: ignore[assignment]
    first = next(module.parameters(), torch.zeros(4))
    generator = torch.Generator().manual_seed(0)
    for shape in _SHAPES:
        probe = torch.randn(2, first.shape[0], *shape, generator=generator).to(first)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # dropouts of channels warn about inputs of other shapes
                return verify_equivalence(module, other, probe, atol=0.0, rtol=0.0)
        except USER_CODE_ERRORS:
            continue
    return None


def _told(report: EquivalenceReport | None) -> str:
    if report is None:
        return "not shown to be the same, because the class takes none of dpfix's probes"
    return f"largest difference on a probe {report.max_difference:.1e}"


def _model(*between: nn.Module) -> dict[str, Any]:
    return {"module": nn.Sequential(nn.Linear(6, 8), *between, nn.Linear(8, 3))}


class _EightFeatures(nn.Module):
    """An activation of a user's own that takes one shape only."""

    inplace = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.view(len(x), 8)
        return x.clamp_(min=0) if self.inplace else x.clamp(min=0)

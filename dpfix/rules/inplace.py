"""In-place activations and dropouts overwrite what a hook on the layer before still needs.

What: any module with ``inplace=True``: ReLU, ELU, LeakyReLU, SiLU, Dropout, and users' own.

Why bad: Opacus's backward hooks hand out views; modifying one in place raises ``Output 0 of BackwardHookFunction is a
view and is being modified inplace`` in the middle of the forward pass (Opacus issue #671).

Example: ``nn.ELU(inplace=True)`` in MONAI's VNet.

Use instead: ``inplace=False``.

Fix safety: exact. The same values go into a new tensor; the report cites the largest difference of the outputs on a
probe, in both modes. A class of which that cannot be shown is reported as changing the model.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dpfix.errors import ModelError
from dpfix.report.finding import Finding, Fixability, Severity
from dpfix.weights.copies import plain_copy
from dpfix.weights.equivalence import EquivalenceReport, verify_equivalence

if TYPE_CHECKING:
    from dpfix.scan.scan import Scan

CODE = "DPF003"
TITLE = "a module works in place"
ERROR = ModelError


def find(scan: Scan) -> Iterator[Finding]:
    """Every module whose ``inplace`` is set.

    Args:
        scan: the objects of the call.

    Yields:
        One finding per module.
    """
    shown: dict[str, EquivalenceReport | None] = {}
    for path, module in scan.modules():
        if getattr(module, "inplace", False) is not True:
            continue
        alike = repr(module) if type(module).__module__.startswith("torch.nn.modules.") else path
        if alike not in shown:
            shown[alike] = _shown(module)
        report = shown[alike]
        yield Finding(
            code=CODE,
            severity=Severity.BLOCKS_TRAINING,
            fixability=Fixability.EXACT if report else Fixability.CHANGES_MODEL,
            fact=f"{scan.place(path)} works in place.",
            why="it overwrites the output of the layer before it, which per-sample hooks still need.",
            fix=f"inplace=False; {_told(report)}",
            path=path,
        )


def fix(module: nn.Module, scan: Scan) -> dict[str, Any]:
    """The attribute that makes the module work out of place.

    Args:
        module: a module with ``inplace=True``.
        scan: the objects of the call; not needed.

    Returns:
        ``{"inplace": False}``.
    """
    return {"inplace": False}


_SHAPES = ((4, 4), (4, 4, 4), (4,), ())
"""Positions behind the channels of a probe; the first that a layer takes is used."""
_FAILURES = (RuntimeError, ValueError, TypeError, AssertionError, NotImplementedError, IndexError, AttributeError)


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
        except _FAILURES:
            continue
    return None


def _told(report: EquivalenceReport | None) -> str:
    if report is None:
        return "not shown to be the same, because the class takes none of dpfix's probes"
    return f"largest difference on a probe {report.max_difference:.1e}"


VALID = (lambda: {"module": nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))},)
INVALID = (
    lambda: {"module": nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 3))},
    lambda: {
        "module": nn.Sequential(nn.Linear(6, 8), nn.ELU(inplace=True), nn.Dropout(0.1, inplace=True), nn.Linear(8, 3))
    },
)

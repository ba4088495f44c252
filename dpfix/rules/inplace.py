"""In-place activations and dropouts overwrite what a hook on the layer before still needs.

What: any module with ``inplace=True``: ReLU, ELU, LeakyReLU, SiLU, Dropout, and users' own.

Why bad: Opacus's backward hooks hand out views; modifying one in place raises ``Output 0 of BackwardHookFunction is a
view and is being modified inplace`` in the middle of the forward pass (Opacus issue #671).

Example: ``nn.ELU(inplace=True)`` in MONAI's VNet.

Use instead: ``inplace=False``.

Fix safety: exact. The same values go into a new tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from dpfix.errors import ModelError
from dpfix.findings import Finding, Fixability, Severity

if TYPE_CHECKING:
    from dpfix.scan import Scan

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
    for path, module in scan.modules():
        if getattr(module, "inplace", False) is not True:
            continue
        yield Finding(
            code=CODE,
            severity=Severity.BLOCKS_TRAINING,
            fixability=Fixability.EXACT,
            fact=f"{scan.place(path)} works in place.",
            why="it overwrites the output of the layer before it, which per-sample hooks still need.",
            fix="inplace=False",
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


VALID = (lambda: {"module": nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))},)
INVALID = (
    lambda: {"module": nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 3))},
    lambda: {
        "module": nn.Sequential(nn.Linear(6, 8), nn.ELU(inplace=True), nn.Dropout(0.1, inplace=True), nn.Linear(8, 3))
    },
)

"""A model in evaluation mode is not being trained.

What: ``module.training`` is false for the root.

Why bad: dropout is off and Opacus refuses the model; per-sample hooks record nothing. Switching the mode here would
also switch on a BatchNorm that was frozen on purpose, so dpfix does not guess.

Example: ``model.eval()`` left over from a validation run.

Use instead: ``model.train()``, then ``eval()`` on the layers that are to stay frozen.

Fix safety: not fixed; refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import nn

from dpfix.errors import ModelError
from dpfix.report.finding import Finding, Fixability, Severity

if TYPE_CHECKING:
    from dpfix.scan.scan import Scan

CODE = "DPF004"
TITLE = "the model is in evaluation mode"
ERROR = ModelError


def find(scan: Scan) -> Iterator[Finding]:
    """Whether the root module is in evaluation mode.

    Args:
        scan: the objects of the call.

    Yields:
        One finding, refused.
    """
    if scan.module.training:
        return
    yield Finding(
        code=CODE,
        severity=Severity.BLOCKS_TRAINING,
        fixability=Fixability.REFUSED,
        fact=f"module: {scan.place('')} is in evaluation mode.",
        why="a model is trained in training mode; turning it on here could unfreeze a BatchNorm.",
        help="call module.train() before make_private_safe, then eval() on the layers to keep frozen.",
    )


VALID = (lambda: {"module": nn.Sequential(nn.Linear(6, 8), nn.Dropout().eval(), nn.Linear(8, 3))},)
INVALID = (lambda: {"module": nn.Sequential(nn.Linear(6, 3)).eval()},)

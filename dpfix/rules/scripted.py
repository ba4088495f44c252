"""A scripted module cannot be seen into.

What: ``torch.jit.ScriptModule`` anywhere in the model.

Why bad: its layers are compiled; neither hooks nor per-sample parameters reach them.

Example: ``torch.jit.script(model)``.

Use instead: the Python module the script was made from; script the trained model afterwards.

Fix safety: not fixed; refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from dpfix.errors import ModelError
from dpfix.report.finding import Finding, Fixability, Severity

if TYPE_CHECKING:
    from dpfix.scan.scan import Scan

CODE = "DPF005"
TITLE = "a scripted module"
ERROR = ModelError


def find(scan: Scan) -> Iterator[Finding]:
    """The outermost scripted module.

    Args:
        scan: the objects of the call.

    Yields:
        At most one finding, refused.
    """
    for path, _ in scan.modules(torch.jit.ScriptModule):
        yield Finding(
            code=CODE,
            severity=Severity.BLOCKS_TRAINING,
            fixability=Fixability.REFUSED,
            fact=f"module: {type(scan.module).__name__} holds a torch.jit script at `{path or 'the root module'}`.",
            why="the layers inside are compiled; no per-sample gradient can be taken of them.",
            help="pass the Python module it was scripted from and script the trained model afterwards.",
            path=path,
        )
        return


VALID = (lambda: {"module": nn.Sequential(nn.Linear(6, 3))},)
INVALID: tuple = ()
"""Scripting is deprecated in torch and warns; the test for this rule scripts a model itself."""

"""A compiled model is trained through the module it was compiled from.

What: the object that ``torch.compile(model)`` returns.

Why: the compiler would trace the per-sample machinery. Its original module holds the same parameters.

Example: ``model = torch.compile(model)`` before the call.

Use instead: compile the trained model, or the one returned by the call.

Fix safety: exact, the original module is taken; the compiled speed is not used.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import nn
from torch._dynamo.eval_frame import OptimizedModule

from dpfix.errors import ModelError
from dpfix.report.finding import Finding, Fixability, Severity

if TYPE_CHECKING:
    from dpfix.scan.scan import Scan

CODE = "DPF006"
TITLE = "a compiled module"
ERROR = ModelError


def unwrap(module: nn.Module) -> nn.Module:
    """The module behind ``torch.compile``.

    Args:
        module: any module.

    Returns:
        The original module, or the module itself.
    """
    return module._orig_mod if isinstance(module, OptimizedModule) else module


def find(scan: Scan) -> Iterator[Finding]:
    """Compiled modules inside the model (the root is unwrapped before the scan).

    Args:
        scan: the objects of the call.

    Yields:
        One finding per module, refused.
    """
    for path, _ in scan.modules(OptimizedModule):
        yield Finding(
            code=CODE,
            severity=Severity.BLOCKS_TRAINING,
            fixability=Fixability.REFUSED,
            fact=f"module: `{path}` is an OptimizedModule made by torch.compile.",
            why="the compiler would trace the per-sample machinery, and its graph cannot be checked.",
            help="compile after training, or compile the whole model (its original is then used).",
            path=path,
        )


VALID = (lambda: {"module": nn.Sequential(nn.Linear(6, 3))},)
INVALID: tuple = ()
"""Compiling needs a tool chain on some machines; the test for this rule uses ``backend='eager'`` itself."""

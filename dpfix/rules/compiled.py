from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from typing_extensions import override

from dpfix.report.finding import Finding, Fixability, Severity
from dpfix.rules.rule import Rule
from dpfix.scan.scan import Scan


class Compiled(Rule):
    """A compiled model is trained through the module it was compiled from.

    What: the object that ``torch.compile(model)`` returns.

    Why: the compiler would trace the per-sample machinery. Its original module holds the same parameters.

    Example: ``model = torch.compile(model)`` before the call.

    Use instead: compile the trained model, or the one returned by the call.
    """

    title = "a compiled module"
    severity = Severity.BLOCKS_TRAINING
    outcomes = {
        Fixability.REFUSED: "a compiled part of a model. Of a model that is compiled as a whole, the original module is "
        "taken, which is exact; the compiled speed is not used."
    }

    @override
    def find(self, scan: Scan) -> Iterator[Finding]:
        for path, _ in scan.modules(OptimizedModule):  # the root is unwrapped before the scan
            yield self.refusal(
                f"module: `{path}` is an OptimizedModule made by torch.compile.",
                "the compiler would trace the per-sample machinery, and its graph cannot be checked.",
                "compile after training, or compile the whole model (its original is then used).",
                path,
            )

    VALID = (lambda: {"module": nn.Sequential(nn.Linear(6, 3))},)
    remark = "Compiling needs a tool chain on some machines; the test for this rule uses ``backend='eager'`` itself."


def unwrap(module: nn.Module) -> nn.Module:
    """The module behind ``torch.compile``.

    Args:
        module: any module.

    Returns:
        The original module, or the module itself.
    """
    return module._orig_mod if isinstance(module, OptimizedModule) else module

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from typing_extensions import override

from dpfix.report.finding import Finding, Severity
from dpfix.rules.rule import Rule
from dpfix.scan.scan import Scan


class EvalMode(Rule):
    """A model in evaluation mode is not being trained.

    What: ``module.training`` is false for the root.

    Why bad: dropout is off and Opacus refuses the model; per-sample hooks record nothing. Switching the mode here would
    also switch on a BatchNorm that was frozen on purpose, so dpfix does not guess.

    Example: ``model.eval()`` left over from a validation run.

    Use instead: ``model.train()``, then ``eval()`` on the layers that are to stay frozen.
    """

    title = "the model is in evaluation mode"
    severity = Severity.BLOCKS_TRAINING

    @override
    def find(self, scan: Scan) -> Iterator[Finding]:
        if not scan.module.training:
            yield self.refusal(
                f"module: {scan.place('')} is in evaluation mode.",
                "a model is trained in training mode; turning it on here could unfreeze a BatchNorm.",
                "call module.train() before make_private_safe, then eval() on the layers to keep frozen.",
            )

    VALID = (lambda: {"module": nn.Sequential(nn.Linear(6, 8), nn.Dropout().eval(), nn.Linear(8, 3))},)
    INVALID = (lambda: {"module": nn.Sequential(nn.Linear(6, 3)).eval()},)

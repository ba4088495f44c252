from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from typing_extensions import override

from dpfix.report.finding import Finding, Severity
from dpfix.rules.rule import Rule
from dpfix.scan.scan import Scan


class Scripted(Rule):
    """A scripted module cannot be seen into.

    What: ``torch.jit.ScriptModule`` anywhere in the model.

    Why bad: its layers are compiled; neither hooks nor per-sample parameters reach them.

    Example: ``torch.jit.script(model)``.

    Use instead: the Python module the script was made from; script the trained model afterwards.
    """

    title = "a scripted module"
    severity = Severity.BLOCKS_TRAINING

    @override
    def find(self, scan: Scan) -> Iterator[Finding]:
        for path, _ in scan.modules(torch.jit.ScriptModule):
            yield self.refusal(
                f"module: {type(scan.module).__name__} holds a torch.jit script at `{path or 'the root module'}`.",
                "the layers inside are compiled; no per-sample gradient can be taken of them.",
                "pass the Python module it was scripted from and script the trained model afterwards.",
                path,
            )
            return  # the outermost one

    VALID = (lambda: {"module": nn.Sequential(nn.Linear(6, 3))},)
    remark = "Scripting is deprecated in torch and warns; the test for this rule scripts a model itself."

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from typing_extensions import override

from dpfix.report.finding import Finding, Fixability, Severity
from dpfix.rules.rule import Rule
from dpfix.scan.scan import Scan


class EvalMode(Rule):
    """A model in evaluation mode is not being trained.

    What: ``module.training`` is false for the root.

    Why bad: dropout is off and Opacus refuses the model; per-sample hooks record nothing. Where a layer computes something
    else in training mode, switching it here would also switch on a BatchNorm that was frozen on purpose, so dpfix does not
    guess.

    Example: ``model.eval()`` left over from a validation run.

    Use instead: ``model.train()``, then ``eval()`` on the layers that are to stay frozen.
    """

    title = "the model is in evaluation mode"
    severity = Severity.BLOCKS_TRAINING
    outcomes = {
        Fixability.EXACT: "a model in which no layer looks at the mode: it is put into training mode.",
        Fixability.REFUSED: "not fixed where a layer does; the message names it.",
    }

    @override
    def find(self, scan: Scan) -> Iterator[Finding]:
        if scan.module.training:
            return
        fact = f"module: {scan.place('')} is in evaluation mode."
        changing = [path for path, module in scan.modules() if not module.training and looks_at_mode(module)]
        if not changing:
            why = "a model is trained in training mode; none of its layers computes anything else there."
            yield self.finding(Fixability.EXACT, fact, why, fix="module.training = True", path="")
            return
        more = f" and {len(changing) - 1} more" if len(changing) > 1 else ""
        yield self.refusal(
            fact,
            f"a model is trained in training mode, where {scan.place(changing[0])}{more} may compute something else: turning it "
            "on here could unfreeze a BatchNorm or a dropout.",
            "call module.train() before make_private_safe, then eval() on the layers to keep frozen.",
        )

    @override
    def fix(self, module: nn.Module, scan: Scan) -> Mapping[str, Any]:
        return {"training": True}

    VALID = (lambda: {"module": nn.Sequential(nn.Linear(6, 8), nn.Dropout().eval(), nn.Linear(8, 3))},)
    INVALID = (
        lambda: {"module": nn.Sequential(nn.Linear(6, 3)).eval()},
        lambda: {"module": nn.Sequential(nn.Linear(6, 8), nn.Dropout(), nn.Linear(8, 3)).eval()},
    )


def looks_at_mode(module: nn.Module) -> bool:
    """Whether a module may compute something else in training mode than in evaluation mode."""
    if getattr(module, "p", None) == 0 or (isinstance(module, nn.RNNBase) and module.dropout == 0):
        return False
    if module._forward_pre_hooks or module._forward_hooks:
        return True  # spectral normalisation is such a hook
    try:
        return ".training" in inspect.getsource(type(module).forward)
    except (OSError, TypeError):
        return True

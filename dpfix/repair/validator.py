"""Opacus's own validator has the last word about what was repaired."""

from __future__ import annotations

from opacus.validators import ModuleValidator

from dpfix.errors import ModelError
from dpfix.report.finding import Finding, Severity
from dpfix.scan.request import Request


def check_validator(request: Request, findings: list[Finding]) -> None:
    """Whatever Opacus's own validator still flags must have been answered by a finding; nothing slips through."""
    answered = {f.path for f in findings}
    for path, child in request.module.named_modules():
        validator = ModuleValidator.VALIDATORS.get(type(child))
        if validator is None or path in answered or not any(p.requires_grad for p in child.parameters()):
            continue
        for error in validator(child):
            raise ModelError(
                Finding.refusal(
                    "DPF018",
                    f"{request.scan.place(path)} is refused by Opacus's ModuleValidator: {error}",
                    "",
                    "replace the layer as the message says, or freeze it with requires_grad_(False).",
                    path=path,
                    severity=Severity.BLOCKS_TRAINING,
                )
            )

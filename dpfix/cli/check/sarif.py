"""Findings in SARIF 2.1.0, which code hosts show at their lines.

https://docs.oasis-open.org/sarif/sarif/v2.1.0/sarif-v2.1.0.html
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import quote

import dpfix
from dpfix.cli.check.result import CheckResult, Level, Status
from dpfix.cli.check.run import Located
from dpfix.report.codes import CODES
from dpfix.rules import RULES

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"


def sarif(result: CheckResult, root: Path, exit_code: int) -> dict[str, Any]:
    """The findings of a check as a SARIF log.

    Args:
        result: the check.
        root: folder that files are named from.
        exit_code: of the command.

    Returns:
        A log with one run.
    """
    codes = sorted({one.finding.code for one in result.located})
    failed = result.status in {Status.FAILED, Status.NEVER_PRIVATE}
    invocation: dict[str, Any] = {"executionSuccessful": not failed, "exitCode": exit_code}
    if failed:
        text = result.told.error or result.status.value
        invocation["toolExecutionNotifications"] = [{"level": "error", "message": {"text": text}}]
    run = {
        "tool": {
            "driver": {
                "name": "dpfix",
                "semanticVersion": dpfix.__version__,
                "rules": [{"id": code, "shortDescription": {"text": _meaning(code)}} for code in codes],
            }
        },
        "invocations": [invocation],
        "originalUriBaseIds": {"%SRCROOT%": {"uri": root.as_uri() + "/"}},
        "columnKind": "unicodeCodePoints",
        "results": [_result(one, codes, root) for one in result.located],
    }
    return {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}


def _meaning(code: str) -> str:
    return CODES.get(code) or next((rule.title for rule in RULES if rule.code == code), code)


def _result(one: Located, codes: list[str], root: Path) -> dict[str, Any]:
    finding = one.finding
    parts = (finding.fact, finding.why.strip(), finding.fix and f"Repaired: {finding.fix}", finding.help)
    result: dict[str, Any] = {
        "ruleId": finding.code,
        "ruleIndex": codes.index(finding.code),
        "level": Level.of(finding).value,
        "kind": "fail",
        "message": {"text": "\n".join(filter(None, parts))},
    }
    if one.file:
        file = Path(one.file)
        place = {"uri": file.as_uri()}
        if file.is_relative_to(root):
            place = {"uri": quote(file.relative_to(root).as_posix()), "uriBaseId": "%SRCROOT%"}
        region = {"startLine": max(1, one.line)}
        result["locations"] = [{"physicalLocation": {"artifactLocation": place, "region": region}}]
    return result

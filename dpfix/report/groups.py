"""Findings by kind: those that differ in their place only are one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dpfix.report.finding import Finding, Severity

_ORDER = list(Severity)


@dataclass(frozen=True)
class Group:
    """Findings that differ in their place only.

    Attributes:
        first: the one that is shown.
        others: those that are folded.
    """

    first: Finding
    others: tuple[Finding, ...]


def groups(findings: Iterable[Finding]) -> list[Group]:
    """Findings by kind: what stops the training first, then by effect on the guarantee."""
    found: dict[Any, list[Finding]] = {}
    for f in findings:
        found.setdefault((f.code, f.severity, f.fixability, f.why, f.help), []).append(f)
    kinds = [Group(first, tuple(others)) for first, *others in found.values()]
    return sorted(kinds, key=lambda kind: (not kind.first.refused, _ORDER.index(kind.first.severity)))

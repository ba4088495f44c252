"""One report of a call: what was found, what was changed, and on what evidence the engine was chosen."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum

from jinja2 import Environment, PackageLoader, StrictUndefined

from dpfix.report.finding import Finding, Fixability


@dataclass(frozen=True)
class EngineEvidence:
    """Why an engine was or was not chosen.

    Attributes:
        engine: name of the engine.
        passed: whether it reproduced the batch-of-one reference at every clip norm.
        max_error: largest relative error of a parameter's clipped sum; ``None`` if it did not run.
        seconds: time of one probe step in seconds; ``None`` if it was not timed.
        samples: how many there are in that probe step; 0 if it was not timed.
        reason: what kept it out, or empty.
    """

    engine: str
    passed: bool
    max_error: float | None = None
    seconds: float | None = None
    reason: str = ""
    samples: int = 0

    def __str__(self) -> str:
        if not self.passed:
            return f"{self.engine}: not used: {self.reason}"
        timing = f", {self.seconds * 1e3:.1f} ms per probe step" if self.seconds is not None else ""
        error = "" if self.max_error is None else f", largest relative error {self.max_error:.1e}"
        return f"{self.engine}: equals the batch-of-one reference{error}{timing}"


@dataclass(frozen=True)
class Report:
    """What was found, what was changed, and on what evidence the engine was chosen.

    Holds names, shapes, code places, versions and timings; never data values, losses or gradients.

    Attributes:
        model: class name of the model.
        findings: everything that was found, in the order of the rules.
        engine: the engine that trains, or empty for a refused model.
        evidence: one entry per engine that was tried.
        audit: one line per proof.
        settings: the privacy settings in force.
        versions: versions of the packages involved.
    """

    model: str
    findings: tuple[Finding, ...] = ()
    engine: str = ""
    evidence: tuple[EngineEvidence, ...] = ()
    audit: tuple[str, ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def repairs(self) -> tuple[Finding, ...]:
        """The findings that changed something."""
        changed = (Fixability.EXACT, Fixability.CHANGES_MODEL)
        return tuple(f for f in self.findings if f.fixability in changed)

    @property
    def refusals(self) -> tuple[Finding, ...]:
        """The findings that stop the call."""
        return tuple(f for f in self.findings if f.refused)

    def __str__(self) -> str:
        lines = [f"dpfix report for {self.model}"]
        lines += _section("settings", [f"{k}: {v}" for k, v in self.settings.items()])
        lines += _section(f"findings ({len(self.findings)})", _grouped(self.findings))
        lines += _section("audit", list(self.audit))
        lines += _section(f"engine: {self.engine or 'none'}", [str(e) for e in self.evidence])
        return "\n".join(lines)

    def to_json(self) -> str:
        """The report as a JSON document.

        Returns:
            A JSON object whose keys are the attributes of the report.
        """
        return json.dumps(asdict(self), default=_plain, indent=2)

    def to_html(self) -> str:
        """The report as one self-contained HTML page.

        Returns:
            The page as a string.
        """
        pages = Environment(
            loader=PackageLoader("dpfix.report", ""),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            keep_trailing_newline=True,
        )
        return pages.get_template("report.html").render(report=self)


def _grouped(findings: tuple[Finding, ...]) -> list[str]:
    """One entry for all findings that differ in their place only; the JSON and HTML forms keep every one."""
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for f in findings:
        groups.setdefault((f.code, f.why, f.help), []).append(f)
    out = []
    for first, *others in groups.values():
        places = ", ".join(f"`{f.path}`" for f in others)
        out.append(str(first) + (f"\n  and:  {len(others)} more of the same: {places}" if others else ""))
    return out


def _section(title: str, rows: list[str]) -> list[str]:
    if not rows:
        return []
    return ["", title, *("  " + line for row in rows for line in row.splitlines())]


def _plain(value: object) -> object:
    if isinstance(value, Enum):
        return value.value
    return str(value)

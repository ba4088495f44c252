"""The report in a terminal: five lines first (verdict, engine, cost, epsilon, what was changed), and everything on request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from dpfix.report.finding import Finding, Fixability
from dpfix.report.groups import groups
from dpfix.report.units import duration, size

if TYPE_CHECKING:
    from dpfix.report.curve import EpsilonCurve
    from dpfix.report.report import EngineEvidence, Report

TARGET = "target"
"""Name of the setting that says which epsilon is to be reached."""


def short(report: Report, curve: EpsilonCurve | None = None) -> str:
    """What a reader wants to know first; what stops the training in full.

    Args:
        report: of the call.
        curve: epsilon of the steps so far, of a training that goes on.

    Returns:
        A heading, five lines and where to find more.
    """
    lines = [f"dpfix report for {report.model}", *(f"  {k + ':':9s} {v}" for k, v in summary(report, curve).items())]
    lines += _section("what stops it", _grouped(report.refusals))
    return "\n".join([*lines, "report.details() tells everything, report.to_html() makes a page of it"])


def details(report: Report) -> str:
    """Everything that a report holds."""
    lines = [f"dpfix report for {report.model}"]
    lines += _section("settings", [f"{k}: {v}" for k, v in report.settings.items()])
    lines += _section(f"findings ({len(report.findings)})", _grouped(report.findings))
    lines += _section("audit", list(report.audit))
    lines += _section(f"engine: {report.engine or 'none'}", [str(e) for e in report.evidence])
    lines += _section("versions", [f"{k}: {v}" for k, v in report.versions.items()])
    return "\n".join(lines)


def _grouped(findings: Iterable[Finding]) -> list[str]:
    """One entry for all findings that differ in their place only; the JSON and HTML forms keep every one."""
    out = []
    for group in groups(findings):
        places = ", ".join(f"`{f.path}`" for f in group.others)
        more = f"\n  and:  {len(group.others)} more of the same: {places}" if group.others else ""
        out.append(str(group.first) + more)
    return out


def _section(title: str, rows: list[str]) -> list[str]:
    if not rows:
        return []
    return ["", title, *("  " + line for row in rows for line in row.splitlines())]


def summary(report: Report, curve: EpsilonCurve | None = None) -> dict[str, str]:
    """The five lines, by name; see :func:`short`."""
    return {
        "verdict": verdict(report),
        "engine": _engine(report),
        "cost": _cost(report),
        "epsilon": _epsilon(report, curve),
        "changed": _changed(report),
    }


def verdict(report: Report) -> str:
    """Whether the model can be trained privately, and what that rests on."""
    stopped, shown = len(report.refusals), sum(bool(proof.claim) for proof in report.proofs)
    if stopped:
        unchanged = "" if report.engine else "; nothing was changed"
        return f"refused: {_count(stopped, 'finding stops', 'findings stop')} private training{unchanged}"
    if not report.engine:
        return "not decided yet: the first real step decides"
    if not shown or any(e.engine == report.engine and e.max_error is None for e in report.evidence):
        return "private as far as the script's own per-sample gradients are right: they are not proven"
    return f"private: {_count(shown, 'proof', 'proofs')} on a probe of the data, nothing refused"


def _engine(report: Report) -> str:
    passed = sum(e.passed for e in report.evidence)
    if not report.engine:
        return "none"
    if passed < 2:
        return report.engine
    return f"{report.engine}, the best of {passed} that equal the batch-of-one reference"


def _cost(report: Report) -> str:
    chosen = chosen_evidence(report)
    if chosen is None or chosen.seconds is None:
        return "not timed: there was nothing to choose between" if report.engine else "not known"
    held = "" if chosen.memory is None else f" and {size(chosen.memory)} of tensors"
    return f"{duration(chosen.seconds)}{held} for {_count(chosen.samples, 'sample', 'samples')}, forward to clipped sum"


def chosen_evidence(report: Report) -> EngineEvidence | None:
    """What is known about the engine that trains."""
    return next((e for e in report.evidence if e.engine == report.engine), None)


def _epsilon(report: Report, curve: EpsilonCurve | None) -> str:
    settings = report.settings
    if curve is not None:
        releases, epsilon = curve.so_far[-1]
        target = f"; {settings[TARGET]}" if TARGET in settings else ""
        return f"{epsilon:.4g} at delta {curve.delta:g} after {releases} {curve.counted}{target}"
    if TARGET in settings:
        return settings[TARGET]
    if not settings:
        return "not known"
    parts = [f"{name} {settings[name]}" for name in ("noise multiplier", "sampling") if name in settings]
    return f"{'; '.join(parts)}; get_epsilon(delta) says what is spent"


def _changed(report: Report) -> str:
    exact = [f for f in report.repairs if f.fixability is Fixability.EXACT]
    other = [f for f in report.repairs if f.fixability is Fixability.CHANGES_MODEL]
    parts = []
    if other:
        parts.append(f"{_count(len(other), 'place computes', 'places compute')} something else now ({_codes(other)})")
    if exact:
        parts.append(
            f"{_count(len(exact), 'place computes', 'places compute')} the same in another way ({_codes(exact)})"
        )
    further = [f for f in report.findings if f.fixability is Fixability.NOTHING]
    told = f"; also told: {_codes(further)}" if further else ""
    return (", ".join(parts) or "nothing") + told


def _codes(findings: Iterable[Finding]) -> str:
    return ", ".join(sorted(Counter(f.code for f in findings)))


def _count(number: int, one: str, more: str) -> str:
    return f"{number} {one if number == 1 else more}"

"""What dpfix found, how much it matters and what was done about it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Severity(Enum):
    """Effect of a finding on the guarantee."""

    BREAKS_GUARANTEE = "breaks-guarantee"
    BLOCKS_TRAINING = "blocks-training"
    ADVICE = "advice"


class Fixability(Enum):
    """What can be done about a finding."""

    EXACT = "exact"
    """The repaired model computes the same function."""
    CHANGES_MODEL = "changes-model"
    """The repaired model computes another function, and the report says so."""
    NOTHING = "nothing-to-do"
    """Nothing has to change; the finding explains a choice."""
    REFUSED = "refused"
    """There is no repair that keeps the guarantee; the user has to decide."""


@dataclass(frozen=True)
class Finding:
    """One fact about the model, the optimizer, the loader or the loss.

    Attributes:
        code: stable code, for example ``DPF001``.
        severity: effect on the guarantee.
        fixability: what can be done.
        fact: one sentence with the value and the place.
        why: the reason it matters; several reasons stand on lines of their own, the first after a line break.
        fix: what was changed (or would be).
        help: the way out for the user.
        path: module path, parameter name or argument the finding is about.
    """

    code: str
    severity: Severity
    fixability: Fixability
    fact: str
    why: str
    fix: str = ""
    help: str = ""
    path: str = ""

    @classmethod
    def refusal(
        cls,
        code: str,
        fact: str,
        why: str,
        help: str,
        *,
        path: str = "",
        severity: Severity = Severity.BREAKS_GUARANTEE,
    ) -> Finding:
        """A finding that stops the call or the step; see the class for the fields."""
        return cls(code, severity, Fixability.REFUSED, fact, why, help=help, path=path)

    @classmethod
    def advice(cls, code: str, fact: str, why: str, *, fix: str = "", help: str = "", path: str = "") -> Finding:
        """A finding about which nothing has to be done; see the class for the fields."""
        return cls(code, Severity.ADVICE, Fixability.NOTHING, fact, why, fix, help, path)

    @property
    def refused(self) -> bool:
        """Whether the finding stops the call."""
        return self.fixability is Fixability.REFUSED

    def __str__(self) -> str:
        lines = [f"{self.code} [{self.severity.value}] {self.fact}"]
        if self.why:
            lines.append("  why:" + (self.why if self.why.startswith("\n") else f"  {self.why}"))
        if self.fix:
            lines.append(f"  fix:  {self.fix}  [{self.fixability.value}]")
        if self.help:
            lines.append(f"  help: {self.help}")
        return "\n".join(lines)

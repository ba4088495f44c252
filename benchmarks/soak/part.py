"""What one part of the measurement has found."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """A part of the page.

    Attributes:
        lines: what it prints: sizes, then figures.
        wrong: what must not be, one sentence each; empty if all is well.
    """

    lines: list[str]
    wrong: list[str]

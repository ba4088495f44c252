"""What one run of a script in a process of its own is told, and what it tells."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dpfix.cli.check.neighbour import Change
from dpfix.report.finding import Finding, Fixability, Severity
from dpfix.report.report import EngineEvidence, Layer, Proof, Report


@dataclass(frozen=True)
class Job:
    """What the process is to do.

    Attributes:
        script: the script, in the copy.
        arguments: those of the script.
        folder: where it writes what it finds.
        steps: private steps after which it ends.
        writable: folders that the script may write to.
        places: pairs of a copied folder and the one that it is a copy of.
        base: folder of the run that this one is compared with; empty for the first run.
        change: how the data differ; ``None`` if they do not.
    """

    script: str
    arguments: Sequence[str]
    folder: str
    steps: int
    writable: Sequence[str]
    places: Sequence[tuple[str, str]]
    base: str = ""
    change: Change | None = None

    @classmethod
    def read(cls, file: Path) -> Job:
        """The job that was written down."""
        values = json.loads(file.read_text())
        change = values.pop("change")
        return cls(**values, change=None if change is None else Change(**change))

    def original(self, file: str) -> str:
        """The script's own file that a file of the copy is a copy of; empty for a file from elsewhere."""
        for copied, original in self.places:
            if Path(file).is_relative_to(copied):
                return str(Path(original) / Path(file).relative_to(copied))
        return ""


@dataclass(frozen=True)
class Located:
    """A finding, and where in the script it was found.

    Attributes:
        finding: the finding.
        file: file of the script; empty if unknown.
        line: its line, from 1; 0 if unknown.
    """

    finding: Finding
    file: str = ""
    line: int = 0


@dataclass
class Step:
    """One release of a script.

    Attributes:
        seconds: since the release before it, or since the training was prepared.
        samples: that were drawn for it.
        alike: whether the random numbers were those of the first run when it was released.
        change: how far the clipped sum was from that of the first run, in units of C.
        times: how often a sample may be in it, which the accountant counts with.
        beside: what optimizers beside the private one have made of their parameters that differs from the first run.
    """

    seconds: float
    samples: int
    alike: bool = True
    change: float = 0.0
    times: int = 1
    beside: list[str] = field(default_factory=list)


@dataclass
class Told:
    """What a run tells.

    Attributes:
        status: ``running``, ``enough``, ``ended``, ``refused`` or ``failed``.
        error: the last line of what the script raised, with its place.
        located: findings of the call, refusals and warnings with their places.
        steps: the releases.
        training: what is known about the training: model, engine, loader, optimizer, noise, and so on.
        report: the report of the call as plain values; empty if there is none.
        drawn: the indices of the first draws.
        others: some indices that were not drawn.
        memory: largest memory of the process, in bytes.
    """

    status: str = "running"
    error: str = ""
    located: list[Located] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    training: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    drawn: list[list[int]] = field(default_factory=list)
    others: list[int] = field(default_factory=list)
    memory: int = 0

    def write(self, folder: Path) -> None:
        """Write everything; whoever reads it finds all of it or what was there before."""
        part = folder / "told.part"
        part.write_text(json.dumps(asdict(self), default=lambda value: getattr(value, "value", str(value))))
        part.rename(folder / "told.json")

    @classmethod
    def read(cls, folder: Path) -> Told:
        """What a run has told so far."""
        file = folder / "told.json"
        if not file.exists():
            return cls(status="failed")
        values = json.loads(file.read_text())
        located = [Located(finding_of(one["finding"]), one["file"], one["line"]) for one in values.pop("located")]
        return cls(**{**values, "located": located, "steps": [Step(**step) for step in values["steps"]]})


def finding_of(values: dict[str, Any]) -> Finding:
    """The finding that was written down."""
    kinds = {"severity": Severity(values["severity"]), "fixability": Fixability(values["fixability"])}
    return Finding(**{**values, **kinds})


def report_of(values: dict[str, Any], findings: tuple[Finding, ...]) -> Report:
    """The report that was written down.

    Args:
        values: of its attributes.
        findings: in the place of its own.

    Returns:
        The report.
    """
    of_parts = {"evidence": EngineEvidence, "proofs": Proof, "layers": Layer}
    parts = {name: tuple(of(**one) for one in values[name]) for name, of in of_parts.items()}
    return Report(**{**values, **parts, "findings": findings})

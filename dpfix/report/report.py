"""One report of a call: what was found, what was changed, and on what evidence the engine was chosen."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum

from dpfix.report import page, text
from dpfix.report.finding import Finding, Fixability
from dpfix.report.units import size


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
        memory: bytes of tensors that such a step holds at once, on top of what was there; ``None`` if it was not measured.
        memory_per_sample: bytes that every further sample adds to it; ``None`` if it was not measured.
    """

    engine: str
    passed: bool
    max_error: float | None = None
    seconds: float | None = None
    reason: str = ""
    samples: int = 0
    memory: int | None = None
    memory_per_sample: float | None = None

    def __str__(self) -> str:
        if not self.passed:
            return f"{self.engine}: not used: {self.reason}"
        error = "" if self.max_error is None else f", largest relative error {self.max_error:.1e}"
        timing = "" if self.seconds is None else f", {self.seconds * 1e3:.1f} ms per probe step"
        held = "" if self.memory is None else f", {size(self.memory)} of tensors"
        return f"{self.engine}: equals the batch-of-one reference{error}{timing}{held}"


@dataclass(frozen=True)
class Proof:
    """What was shown on the probe.

    Attributes:
        claim: what it is a proof of, in a word: ``isolated``, ``exact``, ``bounded``; empty for a remark.
        shown: what was shown, with its numbers.
        check: what was compared with what.
        numbers: the numbers by name.
    """

    claim: str
    shown: str
    check: str = ""
    numbers: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.claim}: {self.shown}" if self.claim else self.shown


@dataclass(frozen=True)
class Layer:
    """One module before the repairs and after.

    Attributes:
        path: its path in the model; empty for the model itself.
        before: its class, with the options that PyTorch prints for its own layers; empty if it was not there.
        after: the same for what stands there now.
    """

    path: str
    before: str
    after: str

    @property
    def changed(self) -> bool:
        """Whether something else stands there now."""
        return self.before != self.after


@dataclass(frozen=True)
class Report:
    """What was found, what was changed, and on what evidence the engine was chosen.

    Holds names, shapes, code places, versions and timings; never data values, losses or gradients.

    Attributes:
        model: class name of the model.
        findings: everything that was found, in the order of the rules.
        engine: the engine that trains, or empty for a refused model.
        evidence: one entry per engine that was tried.
        proofs: what was shown on the probe.
        settings: the privacy settings in force.
        versions: versions of the packages involved.
        layers: every module before the repairs and after, in the order of the model.
    """

    model: str
    findings: tuple[Finding, ...] = ()
    engine: str = ""
    evidence: tuple[EngineEvidence, ...] = ()
    proofs: tuple[Proof, ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    layers: tuple[Layer, ...] = ()

    @property
    def repairs(self) -> tuple[Finding, ...]:
        """The findings that changed something."""
        changed = (Fixability.EXACT, Fixability.CHANGES_MODEL)
        return tuple(f for f in self.findings if f.fixability in changed)

    @property
    def refusals(self) -> tuple[Finding, ...]:
        """The findings that stop the call."""
        return tuple(f for f in self.findings if f.refused)

    @property
    def audit(self) -> tuple[str, ...]:
        """One line per proof."""
        return tuple(map(str, self.proofs))

    def __str__(self) -> str:
        return text.short(self)

    def details(self) -> str:
        """Everything that the report holds, for a terminal; :func:`print` shows the short form.

        Returns:
            Settings, findings, proofs, engines and versions.
        """
        return text.details(self)

    def to_json(self) -> str:
        """The report as a JSON document.

        Returns:
            A JSON object whose keys are the attributes of the report.
        """
        return json.dumps(asdict(self) | {"audit": self.audit}, default=_plain, indent=2)

    def to_html(self) -> str:
        """The report as one HTML page that needs nothing else: no script, no network, light and dark.

        Returns:
            The page as a string.
        """
        return page.document(self)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return page.fragment(self)


def _plain(value: object) -> object:
    if isinstance(value, Enum):
        return value.value
    return str(value)

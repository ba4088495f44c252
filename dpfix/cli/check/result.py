"""What a check has found, and how bad it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any

from dpfix.cli.check.neighbour import Change
from dpfix.cli.check.run import Located, Step, Told, report_of
from dpfix.report.finding import Finding, Fixability, Severity
from dpfix.report.report import Report

SLACK = 1e-3
"""Part of C by which Opacus's ``1 / (norm + 1e-6)`` and rounding may exceed it."""


class Status(Enum):
    """What became of a script."""

    LOOKED_AT = "looked at"
    REFUSED = "refused"
    NEVER_PRIVATE = "never made a private step"
    FAILED = "failed"


class Level(Enum):
    """How bad a finding is, in the words of SARIF."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"

    @classmethod
    def of(cls, finding: Finding) -> Level:
        """The level of a finding."""
        if finding.refused:
            return cls.ERROR
        unrepaired = finding.fixability is Fixability.NOTHING and finding.severity is not Severity.ADVICE
        return cls.WARNING if unrepaired else cls.NOTE


@dataclass(frozen=True)
class Replay:
    """The script on neighbouring data.

    Attributes:
        change: how the data differ; ``None`` if they do not.
        told: what the run told.
    """

    change: Change | None
    told: Told

    @property
    def bound(self) -> int:
        """How far a record may move the sum, in units of C, if it may be in it once: twice as far if another takes its place."""
        return 1 if self.change is None or self.change.left_out else 2

    def exceeds(self, step: Step) -> bool:
        """Whether a step moved further than a record may move it."""
        return not step.change <= self.bound * step.times * (1 + SLACK)  # what is not a number does, too

    @property
    def compared(self) -> list[tuple[int, Step]]:
        """The steps that can be compared, with their numbers: those with the random numbers of the first run."""
        return [(n, step) for n, step in enumerate(self.told.steps, 1) if step.alike]

    @property
    def largest(self) -> float:
        """How far the sum moved at most, as a multiple of how often the record may be in it."""
        return max((step.change / step.times for _, step in self.compared), default=0.0)

    @property
    def excess(self) -> bool:
        """Whether a step moved further than a record may move it."""
        return any(self.exceeds(step) for _, step in self.compared)


@dataclass(frozen=True)
class CheckResult:
    """What a check has found.

    Attributes:
        script: the script.
        told: what its first run told.
        status: what became of it.
        replays: the runs on neighbouring data.
        again: the script once more on the same data, where a replay has moved too far.
        printed: the end of what the script printed.
    """

    script: Path
    told: Told
    status: Status
    replays: tuple[Replay, ...] = ()
    again: Replay | None = None
    printed: str = ""

    @cached_property
    def located(self) -> tuple[Located, ...]:
        """All findings, the worst first."""
        order = list(Level)
        found = [*self.told.located, *self._measured(), *self._of_replays()]
        return tuple(sorted(found, key=lambda one: order.index(Level.of(one.finding))))

    @property
    def report(self) -> Report | None:
        """The report of the call with all findings of the check; ``None`` if there is neither."""
        findings = tuple(one.finding for one in self.located)
        if self.told.report:
            return report_of(self.told.report, findings)
        return Report(self.script.name, findings) if findings else None

    @property
    def repeatable(self) -> bool:
        """Whether the script did the same again on the same data."""
        return self.again is None or all(step.change <= SLACK for step in self.again.told.steps)

    def count(self, level: Level) -> int:
        """How many findings are of a level."""
        return sum(Level.of(one.finding) is level for one in self.located)

    def exit_code(self, *, strict: bool) -> int:
        """The exit status of the command.

        Args:
            strict: whether warnings count.

        Returns:
            0 right, 1 warnings, 2 refused or leaking, 3 failed or never private.
        """
        if self.count(Level.ERROR):
            return 2
        if self.status in {Status.FAILED, Status.NEVER_PRIVATE}:
            return 3
        return int(strict and self.count(Level.WARNING) > 0)

    def _place(self) -> tuple[str, int]:
        """The line of the call."""
        file, line = self.told.training.get("place", ("", 0))
        return (file, line) if file else (str(self.script), 1)

    def _measured(self) -> Iterator[Located]:
        moved = [(replay, n, step) for replay in self.replays for n, step in replay.compared if replay.exceeds(step)]
        if not moved:
            return
        replay, number, step = max(moved, key=lambda one: one[2].change / (one[0].bound * one[2].times))
        assert replay.change is not None
        if not self.repeatable:
            yield Located(
                _unsure(
                    "the script does not do the same twice on the same data, so that what a record changes cannot be measured.",
                    "It draws random numbers that the check cannot repeat (from the clock, or a generator that nobody seeds), or "
                    "its operations are not deterministic.",
                    "Seed the script's own generators, or set torch.use_deterministic_algorithms(True).",
                ),
                *self._place(),
            )
            return
        yield Located(
            Finding.refusal(
                "DPF047",
                f"a record that is {replay.change.kind} moves the clipped sum of private step {number} by {step.change:.3g} C; "
                f"at most {replay.bound * step.times} C is accounted for.",
                "Noise and epsilon stand for a smaller change, so the guarantee does not hold. All releases before this step and "
                "all random numbers were the same in both runs.",
                "Look for what carries one record's values into the gradients of others outside of the model's call: a data set "
                "or collate function with a memory, statistics that are updated while training, labels made from other samples.",
                path="data_loader",
            ),
            *self._place(),
        )

    def _of_replays(self) -> Iterator[Located]:
        if self.status is Status.LOOKED_AT and self.told.steps and not self.replays:
            yield Located(
                _unsure(
                    "the script was not replayed: which records its steps are made of is not known, or it has no others.",
                    "So nothing was measured; what is found otherwise stands.",
                    "Draw batches with a torch DataLoader from a data set of several records.",
                ),
                *self._place(),
            )
        names = {name for replay in self.replays for step in replay.told.steps for name in step.beside}
        for name in sorted(names):
            yield Located(
                _unsure(
                    f"what another optimizer ({name.split()[0]}) trains beside the private one differs on neighbouring data.",
                    "It learns from the records, and not from what is released alone. The guarantee does not speak about it.",
                    "Keep its parameters to yourself, or train them privately too.",
                ),
                *self._place(),
            )
        refused = [(replay, one) for replay in self.replays for one in replay.told.located if one.finding.refused]
        known = {one.finding.code for one in self.told.located}
        for _, one in refused[:1]:
            if one.finding.code not in known:
                yield one
        failed = [replay for replay in self.replays if replay.told.status == "failed"]
        if failed and failed[0].change is not None:
            yield Located(
                _unsure(
                    f"the script failed with record {failed[0].change.record} {failed[0].change.kind}: {failed[0].told.error}",
                    "On neighbouring data it behaves in another way, which is visible without noise.",
                    "Let the script train on any data set of this form.",
                ),
                *self._place(),
            )

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {
            "script": str(self.script),
            "status": self.status.value,
            "error": self.told.error,
            "findings": [
                {
                    "code": one.finding.code,
                    "level": Level.of(one.finding).value,
                    "severity": one.finding.severity.value,
                    "fixability": one.finding.fixability.value,
                    "fact": one.finding.fact,
                    "why": one.finding.why,
                    "fix": one.finding.fix,
                    "help": one.finding.help,
                    "path": one.finding.path,
                    "file": one.file,
                    "line": one.line,
                }
                for one in self.located
            ],
            "training": self.told.training,
            "steps": [{"seconds": step.seconds, "samples": step.samples} for step in self.told.steps],
            "memory_bytes": self.told.memory,
            "replays": [
                {
                    "change": None if replay.change is None else replay.change.kind,
                    "record": None if replay.change is None else replay.change.record,
                    "bound": replay.bound,
                    "largest": replay.largest,
                    "steps": [{"change": s.change, "times": s.times, "compared": s.alike} for s in replay.told.steps],
                }
                for replay in self.replays
            ],
            "repeatable": self.repeatable,
        }


def _unsure(fact: str, why: str, help: str) -> Finding:
    return Finding("DPF048", Severity.BLOCKS_TRAINING, Fixability.NOTHING, fact, why, help=help)

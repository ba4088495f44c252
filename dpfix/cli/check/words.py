"""A check in words."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from dpfix.cli.check.result import CheckResult, Level, Replay, Status
from dpfix.cli.check.run import Located
from dpfix.report.finding import Finding, Fixability
from dpfix.sampling.rate import BY_CHANCE, accounted_compositions
from dpfix.scan.arguments import check_delta
from dpfix.training.epsilon import spent
from dpfix.training.pld_accountant import new_accountant

SHOWN_PASSES = (1, 10, 100)
"""Passes whose epsilon is told where nobody says how many there are."""

VERDICTS = {
    Status.FAILED: "failed",
    Status.NEVER_PRIVATE: "made no private step",
    Status.REFUSED: "refused",
}


def words(found: CheckResult, *, epochs: float | None = None, delta: float | None = None) -> str:
    """A check for a terminal.

    Args:
        found: the check.
        epochs: passes that the script makes.
        delta: for epsilon; a power of ten below 1 / number of samples if not given.

    Returns:
        Several lines, the verdict first.
    """
    lines = [f"dpfix check {found.script.name}: {_verdict(found)}"]
    if found.status in {Status.FAILED, Status.NEVER_PRIVATE}:
        lines += [f"  {found.told.error or 'it ended without an optimizer.step() of a private training'}"]
    told = found.told.training
    if told:
        lines += [
            f"  model        {told['model']}, {told['parameters']} parameters, engine {told['engine'] or 'not chosen'}"
        ]
    if "rate" in told:
        lines += [*_training(found, told), *(f"  {line}" for line in map(_replay, found.replays))]
        lines += _budget(told, epochs, delta)
    for level in Level:
        for one, more in _grouped([o for o in found.located if Level.of(o.finding) is level]):
            lines += ["", *_finding(one, more, level)]
    if found.status in {Status.FAILED, Status.NEVER_PRIVATE} and found.printed:
        lines += ["", "the script printed at last:", *(f"  | {line}" for line in found.printed.splitlines()[-12:])]
    return "\n".join(lines)


def _verdict(found: CheckResult) -> str:
    errors, warnings = found.count(Level.ERROR), found.count(Level.WARNING)
    if errors:
        return "not private" if found.status is Status.LOOKED_AT else "refused"
    known = VERDICTS.get(found.status, "nothing found that breaks the guarantee")
    return f"{known}, {_count(warnings, 'warning')}" if warnings else known


def _training(found: CheckResult, told: dict[str, Any]) -> Iterator[str]:
    unit, workers = told["unit"], told["workers"]
    yield (
        f"  sampling     {told['sampling']}, rate {told['rate']:.4g}: about {told['batch_size']:g} of {told['samples']} {unit}s, "
        f"{told['batches']} batches a pass" + (f", {_count(workers, 'worker')}" if workers else "")
    )
    seeded = "; seed= makes it computable" if told["seed"] else ""
    yield f"  noise        {told['noise_multiplier']:g} x C, C = {told['max_grad_norm']} ({told['optimizer']}){seeded}"
    steps = [step.seconds for step in found.told.steps]
    if steps:
        middle = sorted(steps[1:] or steps)[len(steps[1:] or steps) // 2]
        memory = f", {found.told.memory / 2**20:.0f} MiB at most" if found.told.memory else ""
        yield (
            f"  steps        {len(steps)} looked at; about {middle * 1e3:.3g} ms each, {_time(middle * told['batches'])} a pass"
            f"{memory}"
        )


def _replay(replay: Replay) -> str:
    assert replay.change is not None
    compared = replay.compared
    what = f"{replay.change.kind:12s} record {replay.change.record}"
    if not compared:
        if not replay.told.steps:
            return f"{what}: the script made no private step ({replay.told.error or replay.told.status})"
        return f"{what}: not comparable, since the loop draws other random numbers for another batch size"
    left = len(replay.told.steps) - len(compared)
    return (
        f"{what} moves the released sum by {replay.largest:.2f} C, allowed {replay.bound} C, in {_count(len(compared), 'step')}"
        + (f" ({left} drew other random numbers)" if left else "")
    )


def _budget(told: dict[str, Any], epochs: float | None, delta: float | None) -> list[str]:
    """Epsilon after some passes, if nothing changes on the way; how many the script makes is only known if it is said."""
    below = 10.0 ** math.floor(math.log10(1 / told["samples"]) - 1e-9)
    chosen = check_delta(below if delta is None else delta)
    if not told["noise_multiplier"]:
        return ["  budget       none: no noise is added"]
    passes = SHOWN_PASSES if epochs is None else (epochs,)
    rate = told["rate"] if told["sampling"] in BY_CHANCE else 1.0
    parts = []
    for number in passes:
        accountant = new_accountant("prv")
        releases = accounted_compositions(told["batches"], told["sampling"], number)
        accountant.history = [(told["noise_multiplier"], rate, releases)]
        parts.append(f"{spent(accountant, chosen).epsilon:.3g} after {number:g} pass{'es' * (number != 1)}")
    known = "" if epochs is not None else "; --epochs says how many the script makes"
    return [f"  budget       epsilon {', '.join(parts)} (delta {chosen:g}){known}"]


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _time(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 60 else f"{seconds / 60:.3g} min"


def _grouped(located: list[Located]) -> list[tuple[Located, int]]:
    groups: dict[tuple[str, str, str], list[Located]] = {}
    for one in located:
        groups.setdefault((one.finding.code, one.finding.why, one.finding.help), []).append(one)
    return [(first, len(others)) for first, *others in groups.values()]


def _finding(one: Located, more: int, level: Level) -> Iterator[str]:
    finding: Finding = one.finding
    place = f"{one.file}:{one.line}: " if one.file else ""
    yield f"{place}{level.value} {finding.code}: {finding.fact}" + (f" (and {more} more of the same)" if more else "")
    if level is Level.NOTE and finding.fixability is Fixability.NOTHING:
        return
    for name, text in (("why", finding.why.strip()), ("fix", finding.fix), ("help", finding.help)):
        if text:
            yield f"  {name + ':':5s} {text}"

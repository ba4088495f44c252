"""The file of a budget: read whole, changed by one process at a time, replaced at once.

Two files are locked while the budget is changed. One of the same name with ``.lock`` at its end, which stays empty, is the queue:
the budget itself is replaced, and a lock on it goes with the old one. The budget's own file is locked besides, whatever name
leads to it: it keeps others out where the queue was removed, or the budget was moved, while a process was stopped in the middle.
"""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from dpfix.errors import BudgetError
from dpfix.training.epsilon import LARGEST_NOISE, Entry, coarser
from dpfix.weights.files import written_whole

try:
    import fcntl
except ImportError:  # there are systems without it
    fcntl = None

VERSION = 1
"""Of the format."""
WHAT = "privacy budget of one data set, written by dpfix: what every training on it released (docs/budget.md)"
ACCOUNTANTS = ("prv", "rdp", "pld")
"""What may compose the releases; ``gdp`` is an approximation that may lie below the truth."""
PATIENCE = 120.0
"""Seconds for which a process waits until the others have written."""
MOST_ROWS = 500
"""Different settings of one training that are written; more are rounded, to less noise and larger rates."""

ONE = threading.RLock()
"""Held by the thread of this process that changes a budget, or what one of its trainings has reserved; nothing else is waited for
with it but the file."""
os.register_at_fork(after_in_child=ONE._at_fork_reinit)  # type: ignore[attr-defined]  # its holder is not in the child


@dataclass(frozen=True)
class Line:
    """One training, as it stands in the file.

    Attributes:
        model: class name of the model, for readers.
        begun: when it began, for readers.
        released: noise multiplier, rate and number of its releases.
        ahead: releases that it may make before it writes again.
    """

    model: str
    begun: str
    released: tuple[Entry, ...] = ()
    ahead: Entry | None = None

    @property
    def entries(self) -> list[Entry]:
        """Everything that counts."""
        return [*self.released, *([] if self.ahead is None else [self.ahead])]

    @property
    def steps(self) -> int:
        """How many releases they are."""
        return sum(steps for *_, steps in self.entries)


@dataclass(frozen=True)
class Content:
    """What the file of a budget holds.

    Attributes:
        epsilon: the budget.
        delta: its delta.
        accountant: what composes the releases.
        samples: records of the data set; ``None`` before the first release.
        parts: whether trainings may draw from parts of them, as data sets of their own.
        unit: whose privacy it is.
        trainings: by name, the earliest first.
        writes: how often it was written.
    """

    epsilon: float
    delta: float
    accountant: str
    samples: int | None = None
    parts: bool = False
    unit: str = ""
    trainings: Mapping[str, Line] = field(default_factory=dict)
    writes: int = 0

    def with_lines(self, lines: Mapping[str, Line]) -> Content:
        """With other lines for some trainings."""
        return replace(self, trainings={**self.trainings, **lines})

    @property
    def history(self) -> list[Entry]:
        """Everything that counts, as the history of an accountant."""
        return counted(entry for line in self.trainings.values() for entry in line.entries)


Change = Callable[[Content | None], Content | None]


def counted(entries: Iterable[Entry]) -> list[Entry]:
    """The same releases with one entry for each setting."""
    settings: Counter[tuple[float, float]] = Counter()
    for noise, rate, steps in entries:
        settings[noise, rate] += steps
    return [(*setting, steps) for setting, steps in settings.items()]


class BudgetFile:
    """The file of a budget.

    Args:
        path: of the file; links are followed now, and a change of the working directory changes nothing.

    Raises:
        BudgetError: files cannot be locked on this system.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(os.path.realpath(path))
        if fcntl is None:
            raise BudgetError(
                f"{self.path.name}: this system has no fcntl, so that the file of a budget cannot be locked.",
                "Trainings that write at the same time would overwrite each other's releases.",
                "Train on Linux or macOS, or without budget=.",
                path="budget",
            )

    def read(self) -> Content | None:
        """Read the file.

        Returns:
            What it holds; ``None`` if there is none.

        Raises:
            BudgetError: it cannot be read, is damaged, or was written by a later version.
        """
        try:
            text = self.path.read_bytes()
            links = self.path.stat().st_nlink
        except FileNotFoundError:
            return None
        except OSError as error:
            raise BudgetError(
                f"the file of the budget cannot be read: {error}.", help="Name a file that can be read.", path="budget"
            ) from error
        if links > 1:
            raise BudgetError(
                f"{self.path} has {links} names (hard links).",
                "It is replaced when it is written, and the other names would keep an old content.",
                "Keep one name; a symbolic link may point to it.",
                path="budget",
            )
        return self._parsed(text)

    def update(self, change: Change) -> Content | None:
        """Change the file, while no other process does.

        Args:
            change: makes the new content of the present one, or nothing; what it raises leaves the file as it is.

        Returns:
            What the file holds now.

        Raises:
            BudgetError: the file cannot be read, locked or written; it is as it was.
        """
        lock = self.path.with_name(self.path.name + ".lock")
        begin = time.monotonic()
        try:
            while True:
                with ONE, ExitStack() as held:
                    queue = self._locked(lock.open("ab"), held, begin)
                    try:  # to be written to: some file systems lock nothing else
                        own = self._locked(self.path.open("r+b"), held, begin)
                    except FileNotFoundError:
                        own = None
                    if held_is(queue, lock) and held_is(
                        own, self.path
                    ):  # else somebody was faster, or has removed the lock
                        return self._change(change, own)
        except OSError as error:
            raise BudgetError(
                f"the file of the budget cannot be written: {error}.",
                "Nothing is released that is not written there first; the file is as it was.",
                "Name a file in a folder that can be written to, on a file system that can lock files.",
                path="budget",
            ) from error

    def tidy(self) -> None:
        """Remove what processes that were killed while they wrote have left beside the file."""
        pattern = f".{glob.escape(self.path.name[:40])}.{'[0-9a-f]' * 8}.part"
        if any(self.path.parent.glob(pattern)):
            with suppress(BudgetError):  # a folder that cannot be written to can be read
                self.update(lambda now: self._without(pattern, now))

    def _without(self, pattern: str, now: Content | None) -> Content | None:
        for part in self.path.parent.glob(pattern):
            part.unlink(missing_ok=True)
        return None

    def _change(self, change: Change, own: BinaryIO | None) -> Content | None:
        before = self.read()
        after = change(before)
        if after is None:
            return before
        after = replace(after, writes=0 if before is None else before.writes + 1)
        text = _text(after).encode()
        with written_whole(self.path) as file:
            file.write(text)
            new = os.fstat(file.fileno())
            if not held_is(own, self.path):
                raise BudgetError(*gone(self.path.name), path="budget")
        if own is not None and os.fstat(own.fileno()).st_nlink and self._names_are_counted():
            # it was moved at the last moment, and is there still: what has taken its place is not the budget
            if os.path.samestat(new, self.path.stat()):
                self.path.unlink()
            raise BudgetError(*gone(self.path.name), path="budget")
        return after

    def _names_are_counted(self) -> bool:
        """Whether the file system says of an open file that another one has taken its place; some do not."""
        one, other = (self.path.with_name(f".{self.path.name[:40]}.{secrets.token_hex(4)}.part") for _ in range(2))
        try:
            with one.open("xb") as file:
                other.touch()
                other.replace(one)
                return not os.fstat(file.fileno()).st_nlink
        finally:
            one.unlink(missing_ok=True)
            other.unlink(missing_ok=True)

    def _locked(self, file: BinaryIO, held: ExitStack, begin: float) -> BinaryIO:
        held.enter_context(file)
        self._wait_for(file, begin)
        held.callback(fcntl.flock, file, fcntl.LOCK_UN)  # type: ignore[union-attr]  # a fork may hold the file open too
        return file

    def _wait_for(self, held: BinaryIO, begin: float) -> None:
        while True:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # type: ignore[union-attr]
            except BlockingIOError:
                if time.monotonic() - begin > PATIENCE:
                    raise BudgetError(
                        f"another process has held the lock of {self.path.name} for {PATIENCE:g} seconds.",
                        "Nothing is released that is not written there first.",
                        "Find out which process it is (a stopped one, say), and end it or let it go on.",
                        path="budget",
                    ) from None
                time.sleep(0.003)
            else:
                return

    def _parsed(self, text: bytes) -> Content:
        try:
            values = json.loads(text)
            version = values.get("version")
            if values.get("what") == WHAT and isinstance(version, int) and version > VERSION:
                raise BudgetError(
                    f"{self.path.name} was written by a later version of dpfix: its format is {version}; known is {VERSION}.",
                    "What it holds would be read wrongly.",
                    "Install the version of dpfix that wrote it.",
                    path="budget",
                )
            if values.pop("checksum") != _checksum(values):
                raise ValueError("its checksum is that of another content")
            return _content(values)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
            reason = f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else error
            raise BudgetError(
                f"{self.path.name} is damaged, was changed by hand, or is no file of a budget: {reason}.",
                "What was released before is not known for certain, and nothing is released until it is.",
                "Take the last good copy, if nothing was released after it was made; or name another file.",
                path="budget",
            ) from error


def held_is(held: BinaryIO | None, path: Path) -> bool:
    """Whether an open file is still the one of that name; with ``None``, whether there is none."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return held is None
    return held is not None and os.path.samestat(os.fstat(held.fileno()), there)


def gone(name: str) -> tuple[str, str, str]:
    """The refusal of a file that does not hold what was written into it."""
    return (
        f"{name} is gone, or is an earlier copy of itself, or another file: it does not hold what was written there before.",
        "What was released is not known for certain, and nothing is released until it is.",
        "Put the file back as it was.",
    )


# ------------------------------------------------------------------ plain values


def _text(content: Content) -> str:
    values = {
        "what": WHAT,
        "version": VERSION,
        "epsilon": content.epsilon,
        "delta": content.delta,
        "accountant": content.accountant,
        "samples": content.samples,
        "parts": content.parts,
        "unit": content.unit,
        "writes": content.writes,
        "trainings": {
            name: {
                "model": line.model,
                "begun": line.begun,
                "released": [_row(entry) for entry in _few(line.released)],
                "ahead": None if line.ahead is None else _row(line.ahead),
            }
            for name, line in content.trainings.items()
        },
    }
    return json.dumps(values | {"checksum": _checksum(values)}, indent=1) + "\n"


def _few(released: tuple[Entry, ...]) -> Iterable[Entry]:
    noiseless = any(not noise > 0 for noise, *_ in released)
    return released if len(released) <= MOST_ROWS or noiseless else counted(coarser(list(released)))


def _row(entry: Entry) -> dict[str, float]:
    noise, rate, steps = entry
    return {"steps": steps, "noise_multiplier": min(noise, LARGEST_NOISE) if noise > 0 else 0.0, "sampling_rate": rate}


def _checksum(values: Mapping[str, Any]) -> str:
    """Of everything but itself, as it is written."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _content(values: Mapping[str, Any]) -> Content:
    trainings = {
        name: Line(
            str(line["model"]),
            str(line["begun"]),
            tuple(_entry(row) for row in line["released"]),
            None if line["ahead"] is None else _entry(line["ahead"]),
        )
        for name, line in values["trainings"].items()
    }
    samples = values["samples"]
    if values["accountant"] not in ACCOUNTANTS:
        raise ValueError(f"{values['accountant']!r} is no accountant")
    return Content(
        _number(values["epsilon"], math.inf),
        _number(values["delta"], 1.0),
        str(values["accountant"]),
        None if samples is None else int(samples),
        bool(values["parts"]),
        str(values["unit"]),
        trainings,
        int(values["writes"]),
    )


def _entry(row: Mapping[str, Any]) -> Entry:
    noise, rate, steps = row["noise_multiplier"], row["sampling_rate"], row["steps"]
    if not noise >= 0 or not 0 < rate <= 1 or not isinstance(steps, int) or steps < 0:
        raise ValueError(f"{steps!r} steps with noise {noise!r} and rate {rate!r}")
    return float(noise), float(rate), steps


def _number(value: Any, below: float) -> float:
    if not 0 < value < below:
        raise ValueError(f"{value!r} is no number of a budget")
    return float(value)

"""A script, run up to its first private steps, and again on neighbouring data: what is found."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dpfix.cli.check import child
from dpfix.cli.check.neighbour import Change
from dpfix.cli.check.result import CheckResult, Replay, Status
from dpfix.cli.check.run import Job, Told
from dpfix.cli.check.sandbox import OFFLINE, Copied, Workplace
from dpfix.cli.progress import Say
from dpfix.errors import ArgumentError

TAIL = 2000
"""Characters of what a script has printed that are shown where it fails."""


@dataclass(frozen=True)
class Asked:
    """What the command was asked for.

    Attributes:
        workplace: the script and its folder.
        arguments: of the script.
        steps: private steps to look at.
        timeout: seconds for one run.
        records: how many records are left out, one after the other; the first is exchanged too.
        writable: further folders that the script may write to.
    """

    workplace: Workplace
    arguments: tuple[str, ...]
    steps: int
    timeout: float
    records: int
    writable: tuple[str, ...]


def check_script(asked: Asked, say: Say) -> CheckResult:
    """Run the script and replay it.

    Args:
        asked: what was asked for.
        say: told what is being done.

    Returns:
        What was found.

    Raises:
        ArgumentError: the script does not exist, or its folder cannot be copied.
    """
    script = asked.workplace.script
    if not script.is_file():
        raise ArgumentError(
            f"there is no script {script}.",
            help="Pass a Python file, or module:factory for a model alone.",
            path="SCRIPT",
        )
    asked.workplace.check_size()
    with tempfile.TemporaryDirectory(prefix="dpfix-check-") as folder:
        runs = Runs(asked, Path(folder), say)
        base = runs.run("the script as it is")
        result = CheckResult(script, base.told, status_of(base.told), printed=base.printed)
        if result.status is not Status.LOOKED_AT:
            return result
        replays, excess = [], False
        for change in changes(base.told, asked.records):
            found = runs.run(f"with record {change.record} {change.kind}", change)
            replay = Replay(change, found.told)
            replays.append(replay)
            excess |= replay.excess
        again = Replay(None, runs.run("once more as it is").told) if excess else None
    return replace(result, replays=tuple(replays), again=again)


def status_of(told: Told) -> Status:
    """What became of the first run."""
    if told.status == "refused":
        return Status.REFUSED
    if told.status in {"enough", "ended"} or (told.status == "running" and told.steps):
        return Status.LOOKED_AT if told.steps else Status.NEVER_PRIVATE
    return Status.FAILED


def changes(told: Told, records: int) -> list[Change]:
    """What is changed: records that were drawn in most of the steps, left out, and the first of them exchanged."""
    stepped = told.drawn[: max(1, len(told.steps))]
    times = Counter(index for draw in stepped for index in set(draw))
    chosen = [index for index, _ in times.most_common(records)]
    others = [index for index in told.others if index not in chosen]
    if not chosen or not others:
        return []
    return [
        *(Change(index, others[0], left_out=True) for index in chosen),
        Change(chosen[0], others[0], left_out=False),
    ]


@dataclass(frozen=True)
class Ran:
    """One run.

    Attributes:
        told: what it told.
        printed: the end of what the script printed.
    """

    told: Told
    printed: str


class Runs:
    """The runs of one script, each in a process and a copy of its own.

    Args:
        asked: what was asked for.
        folder: a temporary folder.
        say: told what is being done.
    """

    def __init__(self, asked: Asked, folder: Path, say: Say) -> None:
        self._asked, self._folder, self._say, self._number = asked, folder, say, 0

    def run(self, what: str, change: Change | None = None) -> Ran:
        """Run the script.

        Args:
            what: how it is run, in words.
            change: how its data differ.

        Returns:
            What it told; the first run is what the others are compared with.
        """
        self._number += 1
        here = self._folder / f"run{self._number}"
        written = here / "told"
        written.mkdir(parents=True)
        (self._folder / "cache").mkdir(exist_ok=True)
        copied = self._asked.workplace.copy_to(here / "copy")
        job = self._job(copied, written, change)
        (here / "job.json").write_text(json.dumps(asdict(job)))
        told, printed = self._wait(here, copied, what)
        return Ran(told, printed)

    def _job(self, copied: Copied, written: Path, change: Change | None) -> Job:
        asked = self._asked
        places = tuple((os.path.realpath(copy), str(root)) for root, copy in copied.places.items())
        script = copied.place(asked.workplace.script)
        return Job(
            script=os.path.realpath(script.parent) + os.sep + script.name,
            arguments=asked.arguments,
            folder=str(written),
            steps=asked.steps,
            writable=(*asked.writable, str(self._folder)),
            places=places,
            base="" if self._number == 1 else str(self._folder / "run1" / "told"),
            change=change,
        )

    def _wait(self, here: Path, copied: Copied, what: str) -> tuple[Told, str]:
        (here / "tmp").mkdir()
        environment = os.environ | OFFLINE | {
            "PYTHONHASHSEED": "0",
            "PYTHONDONTWRITEBYTECODE": "1",
            "DPFIX_CACHE_DIR": str(self._folder / "cache"),  # so that all runs have the engine of the first
            "TMPDIR": str(here / "tmp"),
            "MLFLOW_TRACKING_URI": (here / "mlruns").as_uri(),
            "MLFLOW_ALLOW_FILE_STORE": "true",
        }  # fmt: skip
        output = here / "output.txt"
        began = time.monotonic()
        with output.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, child.__file__, str(here / "job.json")],
                cwd=copied.place(self._asked.workplace.cwd),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            timed_out = False
            try:
                while process.poll() is None:
                    seconds = time.monotonic() - began
                    if seconds > self._asked.timeout:
                        timed_out = True
                        break
                    runs = self._asked.records + 2  # as it is, without each of the records, with one exchanged
                    self._say(f"dpfix check: {what}: {seconds:.0f} s", min(1.0, (self._number - 1) / runs))
                    time.sleep(0.1)
            finally:
                _end(process)
        told = Told.read(here / "told")
        printed = output.read_text(errors="replace")[-TAIL:]
        for root, copy in copied.places.items():
            printed = printed.replace(str(copy), str(root))
        if timed_out:
            told.error = (
                f"it was ended after {self._asked.timeout:g} s (--timeout) with {len(told.steps)} private steps"
            )
            told.status = "running" if told.steps else "failed"
        elif told.status in {"running", "failed"} and not told.error:
            told.status, told.error = "failed", f"its process ended with status {process.returncode}"
        return told, printed


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process and whatever it has started."""
    try:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        elif process.poll() is None:
            process.kill()
    except ProcessLookupError:
        pass
    process.wait()

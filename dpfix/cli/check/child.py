"""The process of a checked script: the script as its own main program, with the recorder put in before it."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[3])  # of dpfix, until the script's own folder takes its place

import random
import runpy
import types

import numpy as np
import opacus
import torch

import dpfix
from dpfix.cli.check.recorder import Recorder
from dpfix.cli.check.run import Job, Located, Told
from dpfix.cli.check.writes import guard_writes
from dpfix.errors import DPFixError
from dpfix.report.finding import Finding, Severity

OPACUS_ENGINE = Finding(
    "DPF048",
    Severity.BLOCKS_TRAINING,
    Finding.advice("", "", "").fixability,
    "the script trains with opacus.PrivacyEngine, which was checked with dpfix.SafePrivacyEngine in its place.",
    "What Opacus's own engine does, which neither repairs nor looks at the loop, is not what was looked at.",
    help="Import SafePrivacyEngine from dpfix in the place of Opacus's PrivacyEngine.",
    path="privacy_engine",
)


def run(job: Job) -> None:
    """Run the script of a job, up to its last step or the end."""
    told = Told()
    recorder = Recorder(job, told)
    recorder.put_in()
    engine: Any = type("SafePrivacyEngine", (dpfix.SafePrivacyEngine,), {"__init__": _in_place_of_opacus(recorder)})
    opacus.PrivacyEngine = opacus.privacy_engine.PrivacyEngine = engine  # type: ignore[attr-defined]
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    sys.argv, sys.path[0] = [job.script, *job.arguments], str(Path(job.script).parent)
    home = str(Path(dpfix.__file__).parents[1])
    sys.path += [] if home in sys.path else [home]
    guard_writes(job.writable)
    try:
        runpy.run_path(job.script, run_name="__main__")
    except SystemExit as left:
        if left.code not in (None, 0):
            told.error = f"the script ended with sys.exit({left.code!r})"
            recorder.end("failed")
    except DPFixError as error:
        traceback.print_exc()
        place = _place(job, error.__traceback__)
        told.located += [Located(finding, *place) for finding in error.findings]
        told.error = f"{type(error).__name__}: {error}".splitlines()[0]
        recorder.end("refused")
    except BaseException as error:  # noqa: BLE001  # whatever the script raises is its own, and is told
        traceback.print_exc()
        file, line = _place(job, error.__traceback__)
        told.error = (f"{file}:{line}: " if file else "") + f"{type(error).__name__}: {error}".splitlines()[0]
        recorder.end("failed")
    recorder.end("ended")


def _in_place_of_opacus(recorder: Recorder) -> Any:
    def __init__(self: Any, *, accountant: str = "prv", secure_mode: bool = False) -> None:
        dpfix.SafePrivacyEngine.__init__(self, accountant=accountant, secure_mode=secure_mode)
        if not any(one.finding == OPACUS_ENGINE for one in recorder.told.located):
            recorder.told.located.append(Located(OPACUS_ENGINE, *recorder.place_of(sys._getframe(1))))

    return __init__


def _place(job: Job, trace: types.TracebackType | None) -> tuple[str, int]:
    """The innermost line of the script's own files in a traceback."""
    place = ("", 0)
    while trace is not None:
        file = job.original(trace.tb_frame.f_code.co_filename)
        place = (file, trace.tb_lineno) if file else place
        trace = trace.tb_next
    return place


if __name__ == "__main__":
    run(Job.read(Path(sys.argv[1])))

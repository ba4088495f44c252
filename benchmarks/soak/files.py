"""Kills while a checkpoint is saved, and files that no training has saved."""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.common import tables
from benchmarks.soak.part import Part
from tests.training.test_checkpoint_files import load_hostile, lost_by_kills


def kills(number: int) -> Part:
    """The script that is killed is that of tests/training/test_checkpoint_files.py."""
    with tempfile.TemporaryDirectory() as folder:
        lost = lost_by_kills(Path(folder), number)
    lines = [*tables.head("kills while saving", "checkpoints lost"), tables.row(number, lost)]
    return Part(lines, [f"{lost} of {number} kills lost the checkpoint"] if lost else [])


def hostile() -> Part:
    """The files are those of tests/training/test_checkpoint_files.py."""
    with tempfile.TemporaryDirectory() as folder:
        files, wrong = load_hostile(Path(folder))
    titles = "hostile files", "loaded otherwise than saved, other errors, or refused with a trace"
    return Part([*tables.head(*titles), tables.row(files, len(wrong))], wrong)

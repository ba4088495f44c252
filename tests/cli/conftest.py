"""The scripts that are checked are no tests."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

collect_ignore = ["scripts"]
SCRIPTS = Path(__file__).parent / "scripts"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The scripts in a folder of their own, which is the working folder."""
    place = tmp_path / "project"
    shutil.copytree(SCRIPTS, place, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(place)
    return place

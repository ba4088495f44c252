"""The scripts that measure can be run, and the commands that pages print are those of scripts that exist."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if path.stem != "__init__")
PAGES = [ROOT / "Makefile", ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("name", [*SCRIPTS, "zoo.run", "soak.__main__", "frameworks.__main__"])
def test_script_can_be_imported(name: str) -> None:
    """What a script takes from dpfix, from the tests and from its neighbours is there."""
    importlib.import_module(f"benchmarks.{name}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_name_scripts_that_exist(page: Path) -> None:
    text = page.read_text()
    modules = re.findall(r"python -m ((?:benchmarks|tests)[\w.]+)", text)
    files = re.findall(r"python ((?:benchmarks|docs|examples)/[\w/]+\.py)", text)
    assert [name for name in modules if importlib.util.find_spec(name) is None] == []
    assert [name for name in files if not (ROOT / name).exists()] == []

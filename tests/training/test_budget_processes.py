"""A budget in a file that several processes share: kills at any moment, and trainings at the same time."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from opacus.accountants import PRVAccountant, RDPAccountant

import dpfix
from dpfix.training import spender

RATE, DELTA, NOISE = 8 / 24, 1e-3, 4.0
ROOT = Path(dpfix.__file__).parents[1]


def start(*arguments: str, warnings: str = "ignore") -> subprocess.Popen[str]:
    command = [sys.executable, "-W", warnings, "-m", "tests.training.budget_runs", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def answer(process: subprocess.Popen[str]) -> list[int]:
    """How many releases every training told of."""
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    return json.loads(out)


def held(file: Path) -> list[int]:
    """How many releases of every training the file holds."""
    lines = json.loads(file.read_text())["trainings"].values()
    return [
        sum(row["steps"] for row in [*line["released"], *([line["ahead"]] if line["ahead"] else [])]) for line in lines
    ]


def epsilon_of(steps: int, kind: Any = PRVAccountant) -> float:
    accountant = kind()
    accountant.history = [(NOISE, RATE, steps)]
    return accountant.get_epsilon(DELTA)


def at_least(told: int, in_file: int) -> bool:
    """All releases are in the file, and besides them no more than a block."""
    return told <= in_file <= told + max(spender.AHEAD, told // spender.SHARE + 1)


def test_twelve_kills(tmp_path: Path) -> None:
    file = tmp_path / "data.budget.json"
    budget = dpfix.Budget(file, epsilon=1e3, delta=DELTA)
    chance = random.Random(5)
    moments = [chance.uniform(1, 40) for _ in range(12)]
    told = answer(start("kills", str(file), *map(str, moments)))
    assert len(told) == 12 and all(steps >= int(moment) for steps, moment in zip(told, moments, strict=True))
    for releases, in_file in zip(told, held(file), strict=True):
        assert at_least(releases, in_file)
    assert budget.spent() == pytest.approx(epsilon_of(sum(held(file))), rel=1e-9)
    assert budget.spent() >= epsilon_of(sum(told))


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_kill_in_the_middle_of_writing(tmp_path: Path, moment: str) -> None:
    file = tmp_path / "data.budget.json"
    dpfix.Budget(file, epsilon=1e3, delta=DELTA)
    (told,), (in_file,) = answer(start("killed_at", str(file), moment)), held(file)
    assert told == 2 * spender.AHEAD  # that of the third block was never made
    assert in_file == told + (0 if moment == "before" else spender.AHEAD)
    dpfix.Budget(file)
    assert {path.name for path in tmp_path.iterdir()} == {file.name, f"{file.name}.lock"}


def test_four_trainings_at_the_same_time(tmp_path: Path) -> None:
    file = tmp_path / "data.budget.json"
    budget = dpfix.Budget(file, epsilon=3.0, delta=DELTA, accountant="rdp")
    told = answer(start("together", str(file), "4"))
    assert all(told) and sorted(held(file)) == sorted(told)
    assert budget.spent() == pytest.approx(epsilon_of(sum(told), RDPAccountant), rel=1e-9)
    assert budget.spent() <= 3.0


@pytest.mark.parametrize("most", [5, 1000])
def test_a_process_that_ends_by_itself_gives_back(tmp_path: Path, most: int) -> None:
    file = tmp_path / "data.budget.json"
    dpfix.Budget(file, epsilon=0.4 if most > 5 else 8.0, delta=DELTA)
    (told,) = answer(start("alone", str(file), str(most)))
    assert held(file) == [told]
    assert told == 5 or epsilon_of(told) <= 0.4 < epsilon_of(told + 1)

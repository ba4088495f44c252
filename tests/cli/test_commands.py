"""The commands beside ``check``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import dpfix
from dpfix.__main__ import main
from tests.helpers import setting

PLAN = ["plan", "--samples", "1000", "--epochs", "5", "--batch-size", "50", "100", "--epsilon", "3", "--delta", "1e-5"]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"dpfix {dpfix.__version__}\n"


def test_as_a_module() -> None:
    ran = subprocess.run([sys.executable, "-m", "dpfix", "--version"], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["dpfix", dpfix.__version__]


def test_plan_is_that_of_the_function(capsys: pytest.CaptureFixture[str]) -> None:
    plans = dpfix.plan(samples=1000, epochs=5, batch_sizes=[50, 100], target_epsilon=3, target_delta=1e-5)
    assert main(PLAN) == 0
    assert capsys.readouterr().out == f"{plans}\n"
    assert main([*PLAN, "--json", "--seconds-per-sample", "0.01"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["noise_multiplier"] for row in rows] == [row.noise_multiplier for row in plans.rows]
    assert [row["seconds"] for row in rows] == [50, 50]


def test_plan_refuses_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PLAN[:-1], "2"]) == 2
    assert "delta" in capsys.readouterr().err


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Path, float]:
    private = dpfix.make_private_safe(**setting())
    model, optimizer, loader = private
    for x, y in loader:
        optimizer.zero_grad()
        setting()["criterion"](model(x), y).backward()
        optimizer.step()
    path = tmp_path / "training.pt"
    private.privacy_engine.save_checkpoint(path=path, module=model, optimizer=optimizer)
    return path, private.get_epsilon(1e-3)


def test_statement_of_a_checkpoint(checkpoint: tuple[Path, float], capsys: pytest.CaptureFixture[str]) -> None:
    path, epsilon = checkpoint
    assert main(["statement", str(path), "--delta", "1e-3", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["epsilon"] == pytest.approx(epsilon)
    assert (told["steps"], told["checksum"]) == (3, True)
    assert main(["statement", str(path), "--delta", "1e-3"]) == 0
    assert f"({epsilon:.4g}, 0.001)-differential privacy after 3 steps" in capsys.readouterr().out


def test_statement_of_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["statement", str(tmp_path / "none.pt"), "--delta", "1e-3"]) == 2
    assert "none.pt" in capsys.readouterr().err

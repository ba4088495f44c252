"""``dpfix check`` on scripts whose loop is a framework's."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.test_check import checked, codes

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("script", "package", "model"),
    [
        ("lightning_trainer", "lightning", "TrainingStep"),
        ("transformers_trainer", "transformers", "BertForSequenceClassification"),
        ("accelerate_loop", "accelerate", "Sequential"),
        ("accelerate_loop before", "accelerate", "Sequential"),
    ],
)
def test_a_right_script(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    script: str,
    package: str,
    model: str,
) -> None:
    pytest.importorskip(package)
    before = sorted(folder.rglob("*"))
    status, told = checked(capsys, script, "--strict")
    assert (status, codes(told, "warning"), told["training"]["model"]) == (0, [], model)
    left_out, exchanged = told["replays"]
    assert 0.1 < left_out["largest"] <= 1.001 and 0 < exchanged["largest"] <= 2.002
    assert all(step["compared"] for replay in told["replays"] for step in replay["steps"])
    assert sorted(folder.rglob("*")) == before  # logs and checkpoints lie elsewhere


def test_opacus_in_configure_optimizers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lightning")
    status, told = checked(capsys, "lightning_opacus", "--strict")
    (warning,) = [finding for finding in told["findings"] if finding["level"] == "warning"]
    assert status == 1 and "opacus.PrivacyEngine" in warning["fact"]
    assert 0.1 < told["replays"][0]["largest"] <= 1.001

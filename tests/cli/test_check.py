"""``dpfix check`` on small scripts, each run as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dpfix.__main__ import main
from dpfix.cli.check.neighbour import Change, Neighbour
from dpfix.cli.check.replay import changes
from dpfix.cli.check.result import CheckResult, Replay, Status
from dpfix.cli.check.run import Step, Told
from dpfix.cli.check.sandbox import Workplace


def checked(capsys: pytest.CaptureFixture[str], script: str, *more: str, steps: int = 2) -> tuple[int, dict[str, Any]]:
    """The exit status, and what ``--json`` says."""
    target, *after = script.split(" ", 1)
    given = [f"{target}.py", "--steps", str(steps), "--json", "-", *more]
    code = main(["check", *given, *(["--", *after[0].split()] if after else [])])
    return code, json.loads(capsys.readouterr().out)


def codes(told: dict[str, Any], level: str) -> list[str]:
    return [finding["code"] for finding in told["findings"] if finding["level"] == level]


def test_a_right_script(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    files = [str(tmp_path / name) for name in ("told.json", "told.sarif", "page.html")]
    assert main(["check", "right.py", "--json", files[0], "--sarif", files[1], "--html", files[2], "--strict"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""  # progress is shown on terminals only
    assert "dpfix check right.py: nothing found that breaks the guarantee\n" in printed.out
    assert "moves the released sum by 1.00 C, allowed 1 C, in 3 steps" in printed.out
    told = json.loads(Path(files[0]).read_text())
    assert json.loads(Path(files[1]).read_text())["runs"][0]["invocations"] == [
        {"executionSuccessful": True, "exitCode": 0}
    ]
    left_out, exchanged = told["replays"]
    assert left_out["largest"] == pytest.approx(1, abs=1e-3)
    assert 0 < exchanged["largest"] <= 2
    assert told["training"]["rate"] == pytest.approx(0.2)
    assert len(told["steps"]) == 3
    assert "dpfix report for Sequential" in Path(files[2]).read_text()
    after = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    assert after == before  # its results and checkpoint lie elsewhere


@pytest.mark.parametrize(
    ("script", "code", "place"),
    [
        ("coupled", "DPF014", "loss.backward()"),
        ("masked", "DPF014", "model, optimizer, loader = dpfix.make_private_safe("),
        ("second_optimizer", "DPF120", "second.step()"),
    ],
)
def test_a_refused_script(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], script: str, code: str, place: str
) -> None:
    files = ["--sarif", str(tmp_path / "told.sarif"), "--html", str(tmp_path / "page.html")]
    status, told = checked(capsys, script, *files)
    assert (status, codes(told, "error")) == (2, [code])
    assert f"<b>{code}</b>" in (tmp_path / "page.html").read_text()
    sarif = json.loads((tmp_path / "told.sarif").read_text())
    (error,) = [result for result in sarif["runs"][0]["results"] if result["level"] == "error"]
    found = error["locations"][0]["physicalLocation"]
    assert found["artifactLocation"] == {"uri": f"{script}.py", "uriBaseId": "%SRCROOT%"}
    text = (folder / f"{script}.py").read_text().splitlines()
    assert text[found["region"]["startLine"] - 1].strip() == place


def test_a_data_set_that_remembers(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, told = checked(capsys, "memory", "--html", str(tmp_path / "page.html"), steps=3)
    page = (tmp_path / "page.html").read_text()
    assert "<b>DPF047</b>" in page and "refused: 1 finding stops private training<" in page
    assert (status, codes(told, "error")) == (2, ["DPF047"])
    assert told["repeatable"]
    assert max(replay["largest"] / replay["bound"] for replay in told["replays"]) > 1.01
    (error,) = [finding for finding in told["findings"] if finding["level"] == "error"]
    assert "make_private_safe" in (folder / "memory.py").read_text().splitlines()[error["line"] - 1]


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("failing", "failing.py:6: RuntimeError: no such data"),
        ("never_private", ""),
        ("outside /var/absolute.pt", "writes to /var/absolute.pt, which is outside of the copied folder"),
    ],
)
def test_a_script_without_a_private_step(
    folder: Path, capsys: pytest.CaptureFixture[str], script: str, words: str
) -> None:
    status, told = checked(capsys, script)
    assert (status, told["findings"]) == (3, [])
    assert words in told["error"]


def test_a_page_of_a_script_that_is_killed(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, told = checked(capsys, "killed", "--html", str(tmp_path / "page.html"))
    assert (status, told["status"]) == (3, "failed")
    assert "dpfix report for Sequential" in (tmp_path / "page.html").read_text()


def test_a_slow_script(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, told = checked(capsys, "slow", "--timeout", "1", "--sarif", str(tmp_path / "told.sarif"))
    assert (status, told["status"]) == (3, "failed")
    assert "ended after 1 s (--timeout) with 0 private steps" in told["error"]
    sarif = json.loads((tmp_path / "told.sarif").read_text())
    assert not sarif["runs"][0]["invocations"][0]["executionSuccessful"]


@pytest.mark.slow
def test_workers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, told = checked(capsys, "right --workers 2")
    assert status == 0
    assert told["training"]["workers"] == 2
    assert told["replays"][0]["largest"] == pytest.approx(1, abs=1e-3)


@pytest.mark.slow
def test_another_model_beside(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, told = checked(capsys, "beside", "--strict")
    assert (status, codes(told, "error")) == (1, [])
    assert any("differs on neighbouring data" in finding["fact"] for finding in told["findings"])


@pytest.mark.slow
def test_a_loop_that_draws(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, told = checked(capsys, "dropout", "--strict")
    assert (status, told["findings"]) == (0, [])
    left_out, exchanged = told["replays"]
    assert not all(step["compared"] for step in left_out["steps"])
    assert all(step["compared"] for step in exchanged["steps"])


@pytest.mark.slow
def test_opacus_engine(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, told = checked(capsys, "opacus_engine", "--strict")
    assert (status, codes(told, "warning")) == (1, ["DPF048"])
    assert told["replays"][0]["largest"] == pytest.approx(1, abs=1e-3)


# ------------------------------------------------------------------ a model alone

FACTORIES = """
from torch import nn

def right(): return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
def words(): return nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))

class Mixes(nn.Linear):
    def __init__(self): super().__init__(3, 3)
    def forward(self, x): return super().forward(x - x.mean(0))
"""


@pytest.mark.parametrize(
    ("name", "given", "status"),
    [
        ("right", ["--input", "4,3"], 0),
        ("words", ["--input", "4,7", "--input-dtype", "long"], 0),
        ("Mixes", ["--input", "4,3"], 2),
        ("right", [], 2),
        ("right", ["--input", "4,x"], 2),
        ("missing", ["--input", "4,3"], 2),
    ],
)
def test_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    name: str, given: list[str], status: int,
) -> None:  # fmt: skip
    (tmp_path / "factories_of_a_check.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    monkeypatch.delitem(__import__("sys").modules, "factories_of_a_check", raising=False)
    assert main(["check", f"factories_of_a_check:{name}", *given]) == status
    printed = capsys.readouterr()
    assert ("DPF013" in printed.out) == (name == "Mixes")
    assert bool(printed.err) == (status == 2 and name != "Mixes")


# ------------------------------------------------------------------ arguments and parts


def test_a_large_folder_is_refused_or_linked(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "data").mkdir()
    (folder / "data" / "scans.bin").write_bytes(bytes(3 << 20))
    assert main(["check", "failing.py", "--copy-limit", "2"]) == 2
    assert "--read-only" in capsys.readouterr().err
    workplace = Workplace(folder / "failing.py", folder, (folder / "data",), 2 << 20)
    workplace.check_size()
    copied = workplace.copy_to(tmp_path / "copy")
    assert copied.place(folder / "data").resolve() == folder / "data"
    assert copied.place(folder / "failing.py").resolve() != folder / "failing.py"


def test_no_script(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "missing.py"]) == 2
    assert "there is no script" in capsys.readouterr().err


def test_neighbours() -> None:
    left_out, exchanged = (Neighbour("abcd", Change(1, 3, left_out=flag)) for flag in (True, False))
    assert left_out.__getitems__([0, 1, 2]) == ["a", "c"]
    assert exchanged.__getitems__([0, 1, 2]) == ["a", "d", "c"]
    assert (left_out.change.delivered_of([0, 1, 2]), exchanged.change.delivered_of([0, 1, 2])) == (2, 3)


def test_records_of_the_first_steps_are_chosen() -> None:
    told = Told(steps=[Step(0.1, 2), Step(0.1, 2)], drawn=[[4, 5], [5, 6], [7, 7, 7]], others=[1, 2])
    assert changes(told, 1) == [Change(5, 1, left_out=True), Change(5, 1, left_out=False)]


@pytest.mark.parametrize(
    ("step", "again", "status"),
    [
        (Step(0.1, 2, change=1.0009), 0.0, 0),
        (Step(0.1, 2, change=1.002), 0.0, 2),
        (Step(0.1, 2, change=float("nan")), 0.0, 2),
        (Step(0.1, 2, change=1.9, times=2), 0.0, 0),
        (Step(0.1, 2, change=5.0, alike=False), 0.0, 0),
        (Step(0.1, 2, change=5.0), 0.5, 1),  # what is not the same twice cannot be measured
    ],
)
def test_how_far_is_too_far(step: Step, again: float, status: int) -> None:
    replay = Replay(Change(0, 1, left_out=True), Told(steps=[step]))
    same = Replay(None, Told(steps=[Step(0.1, 2, change=again)]))
    found = CheckResult(Path("train.py"), Told(steps=[step]), Status.LOOKED_AT, (replay,), same)
    assert found.exit_code(strict=True) == status


def test_what_was_not_replayed_is_said() -> None:
    found = CheckResult(Path("train.py"), Told(steps=[Step(0.1, 2)]), Status.LOOKED_AT)
    assert [one.finding.code for one in found.located] == ["DPF048"]
    assert (found.exit_code(strict=True), found.exit_code(strict=False)) == (1, 0)

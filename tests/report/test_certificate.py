"""A certificate fits as it was made, and no longer once anything in it was changed."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import dpfix
from dpfix.training import certificate as making
from dpfix.training.certificate import digest_of, package_hash, plan_hash, sealed
from tests.helpers import setting, train

KEY = "sixteen bytes or more"


def trained(**changes: Any) -> dpfix.PrivateTraining:
    private = dpfix.make_private_safe(**setting(nn.Sequential(nn.Linear(6, 3)), **changes))
    train(private, 2)
    return private


@pytest.fixture(scope="module")
def private() -> dpfix.PrivateTraining:
    return trained()


@pytest.fixture(scope="module")
def made(private: dpfix.PrivateTraining) -> dict[str, Any]:
    return private.certificate(0.01, key=KEY)


def codes(check: dpfix.CertificateCheck) -> list[tuple[str, str]]:
    return [(f.code, f.path) for f in check.findings]


def test_a_certificate_fits(private: dpfix.PrivateTraining, tmp_path: Path) -> None:
    file = tmp_path / "certificate.json"
    made = private.certificate(0.01, file, key=KEY)
    assert json.loads(file.read_text()) == made
    for given in (file, str(file), made):
        check = dpfix.verify_certificate(given, KEY)
        assert check.fits and check.findings == () and "the certificate fits" in str(check)
        assert any("computed again" in note for note in check.notes)
        assert not any("no key was used" in note or "other files" in note for note in check.notes)
    assert KEY not in file.read_text()


def test_it_says_what_the_statement_says(private: dpfix.PrivateTraining, made: dict[str, Any]) -> None:
    statement, loss = private.statement(0.01), made["deployment"]["privacy_loss"]
    assert loss["privacy_parameters"] == {"epsilon": statement.epsilon, "delta": 0.01}
    assert loss["privacy_unit"] == statement.unit and loss["privacy_unit_details"] == statement.adjacency
    own = made["dpfix"]
    assert own["statement"] == json.loads(statement.to_json())
    assert [proof["shown"] for proof in own["proofs"]] == [proof.shown for proof in private.report.proofs]
    assert own["versions"] == private.report.versions and own["plan"]["engine"] == private.plan.engine


def leaves(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(content, dict):
        return [leaf for key, part in content.items() for leaf in leaves(part, (*path, key))]
    if isinstance(content, list):
        return [leaf for key, part in enumerate(content) for leaf in leaves(part, (*path, key))]
    return [path]


def changed(content: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    found = copy.deepcopy(content)
    owner = found
    for key in path[:-1]:
        owner = owner[key]
    owner[path[-1]] = value
    return found


def test_every_change_is_found(made: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpfix.training.certificate_check._inside", lambda *_: [])
    for path in leaves(made):
        check = dpfix.verify_certificate(changed(made, path, "another"), KEY)
        assert codes(check) and {code for code, _ in codes(check)} == {"DPF051"}, path


def forged(made: dict[str, Any], **values: Any) -> dict[str, Any]:
    """A certificate whose digest was computed anew after changes of the statement, in both places."""
    content = {name: copy.deepcopy(part) for name, part in made.items() if name != "seal"}
    content["dpfix"]["statement"] |= values
    loss = content["deployment"]["privacy_loss"]["privacy_parameters"]
    loss |= {name: value for name, value in values.items() if name in loss}
    return content


def test_without_the_key_a_new_digest_is_taken_and_with_it_is_not(made: dict[str, Any]) -> None:
    content = forged(made, cautions=["none whatever"])
    without = dpfix.verify_certificate(sealed(content, None))
    assert without.fits and any("compute its digest anew" in note for note in without.notes)
    assert codes(dpfix.verify_certificate(sealed(content, None), KEY)) == [("DPF051", "seal.hmac-sha256")]
    other = sealed(content, "another key of sixteen")
    assert codes(dpfix.verify_certificate(other, KEY)) == [("DPF051", "seal.hmac-sha256")]


@pytest.mark.parametrize(
    ("values", "path"),
    [
        ({"epsilon": 0.1}, "epsilon"),
        ({"epsilon": 0.0}, "epsilon"),
        ({"steps": 1}, "schedule"),
        ({"delta": 2.0}, "accountant"),
        ({"accountant": "best"}, "accountant"),
    ],
)
def test_an_epsilon_that_does_not_follow_is_found(made: dict[str, Any], values: dict[str, Any], path: str) -> None:
    assert ("DPF051", path) in codes(dpfix.verify_certificate(sealed(forged(made, **values), None)))


def test_two_texts_for_one_thing_are_found(made: dict[str, Any]) -> None:
    content = forged(made)
    content["deployment"]["privacy_loss"]["privacy_unit"] = "a whole hospital"
    assert codes(dpfix.verify_certificate(sealed(content, None))) == [("DPF051", "the unit")]


def test_no_privacy_is_certified_as_such() -> None:
    made = trained(noise_multiplier=0.0).certificate(0.01)
    assert made["dpfix"]["statement"]["epsilon"] == "infinity"
    assert dpfix.verify_certificate(made).fits
    better = sealed(forged(made, epsilon=1.0), None)
    assert codes(dpfix.verify_certificate(better)) == [("DPF051", "epsilon")]


@pytest.mark.filterwarnings("ignore:GDP accounting")
@pytest.mark.parametrize("accountant", ["rdp", "gdp"])
def test_other_accountants_are_computed_again(accountant: str) -> None:
    check = dpfix.verify_certificate(trained(accountant=accountant).certificate(0.01))
    assert check.fits and any("computed again" in note for note in check.notes)


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "3", "{}", '{"seal": 1, "dpfix": 2}', "[" * 100_000, '{"a": 1, "a": 2}', '{"a": NaN}', '{"a": 1e999}',
        '{"dpfix": {"code": {"package": null}, "format": 1}, "deployment": {}}', "\ud800",
    ],
)  # fmt: skip
def test_what_is_no_certificate_is_said_so(text: str, tmp_path: Path) -> None:
    file = tmp_path / "certificate.json"
    file.write_bytes(text.encode(errors="surrogatepass"))
    check = dpfix.verify_certificate(file)
    assert not check.fits and "does not fit" in str(check)


def test_a_file_that_is_not_there_and_a_short_key(private: dpfix.PrivateTraining, tmp_path: Path) -> None:
    with pytest.raises(dpfix.ArgumentError, match="cannot be opened"):
        dpfix.verify_certificate(tmp_path / "none.json")
    for call in (lambda key: private.certificate(0.01, key=key), lambda key: dpfix.verify_certificate({}, key)):
        for key in ("short", b"", 7):
            with pytest.raises(dpfix.ArgumentError, match="at least 16 bytes"):
                call(key)
    with pytest.raises(dpfix.ArgumentError, match="could not be written"):
        private.certificate(0.01, tmp_path)


def test_the_plans_hash_is_that_of_the_plan(private: dpfix.PrivateTraining) -> None:
    assert plan_hash(private.plan) == plan_hash(trained().plan)
    other = dpfix.make_private_safe(
        **setting(nn.Sequential(nn.Linear(6, 3)), clipping="per_layer", max_grad_norm=[1.0, 1.0])
    )
    assert plan_hash(private.plan) != plan_hash(other.plan)


def copied_package(folder: Path, change: Callable[[Path], object]) -> Path:
    for file in making._files():
        copied = folder / file.relative_to(making.PACKAGE)
        copied.parent.mkdir(parents=True, exist_ok=True)
        copied.write_bytes(file.read_bytes())
    change(folder)
    return folder


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (lambda folder: (folder / "notes.txt").write_text("none of the package"), True),
        (lambda folder: (folder / "api.py").write_text("another"), False),
        (lambda folder: (folder / "api.py").rename(folder / "ape.py"), False),
    ],
)
def test_hash_of_the_package(change: Any, same: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = package_hash()
    monkeypatch.setattr(making, "PACKAGE", copied_package(tmp_path, change))
    assert (package_hash() == before) is same


def test_hash_of_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "train.py"
    script.write_text("pass\n")
    monkeypatch.setattr("__main__.__file__", str(script), raising=False)
    assert making.script_hash() == {"name": "train.py", "sha256": hashlib.sha256(b"pass\n").hexdigest()}
    monkeypatch.setattr("__main__.__file__", None, raising=False)
    assert making.script_hash() is None


def test_the_digest_does_not_depend_on_the_order_of_names(made: dict[str, Any]) -> None:
    assert digest_of(made) == digest_of(dict(reversed(made.items())))

"""What is refused is a finding: the text of the error, the report of a diagnosis and its JSON come from its fields."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from typing import Any

import pytest

import dpfix
from dpfix.report.codes import CODES
from dpfix.report.finding import Finding, Severity
from dpfix.rules import RULES, Rule
from tests.end_to_end.test_refusals import REFUSALS
from tests.rules.examples import example

RULED = {rule.code for rule in RULES}
DIAGNOSED = frozenset(inspect.signature(dpfix.diagnose).parameters)

INVALID = [
    pytest.param(lambda f=factory: example(f).arguments, id=f"{rule.code}-{number}")
    for rule in RULES
    for number, factory in enumerate(rule.INVALID)
    if any(outcome.value == "refused" for outcome in rule.outcomes)
]
REFUSED = [pytest.param(refusal.given, id=refusal.name) for refusal in REFUSALS]


def refusal_of(given: Callable[[], dict[str, Any]]) -> dpfix.DPFixError | None:
    """What a call raises; ``None`` if it goes through, as with a rule's case that is repaired."""
    try:
        dpfix.make_private_safe(**given())
    except dpfix.DPFixError as error:
        return error
    return None


def words(finding: Finding) -> str:
    return " ".join(part for part in (finding.fact, finding.why, finding.help) if part)


@pytest.mark.parametrize("given", [*INVALID, *REFUSED])
def test_error_is_its_findings(given: Callable[[], dict[str, Any]]) -> None:
    error = refusal_of(given)
    if error is None:
        return
    text, first = str(error), error.findings[0]
    in_words = first.code == type(error).code and text == words(first)
    assert in_words or text == "\n".join(map(str, error.findings))
    assert not in_words or "DPF" not in text
    for finding in error.findings:
        assert finding.refused and finding.severity is not Severity.ADVICE
        assert finding.fact and finding.code in RULED | CODES.keys()
        again = [other for other in error.findings if other.code == finding.code]
        assert in_words or len(re.findall(finding.code, text)) == len(again)
        if re.search(r"(at|parameter) `(?!the root module)", finding.fact):
            assert finding.path


@pytest.mark.parametrize("given", REFUSED)
def test_diagnosis_reports_what_the_call_refuses(given: Callable[[], dict[str, Any]]) -> None:
    error = refusal_of(given)
    if error is None or isinstance(error, (dpfix.ArgumentError, dpfix.UnknownArgumentError)):
        return  # what a diagnosis raises too
    report = dpfix.diagnose(**{name: value for name, value in given().items() if name in DIAGNOSED})
    assert [(f.code, f.path) for f in report.findings] == [(f.code, f.path) for f in error.findings]
    told = json.loads(report.to_json())["findings"]
    assert [(entry["code"], entry["path"]) for entry in told] == [(f.code, f.path) for f in error.findings]


def test_a_findings_code_stands_in_the_text_once() -> None:
    finding = Finding.refusal("DPF013", "Net mixes samples.", "it does.", "do not.", path="net")
    error = dpfix.CoupledModelError(finding)
    assert error.findings == (finding,) and str(error) == str(finding)
    assert str(error).count("DPF013") == 1


def test_words_are_a_finding_with_the_code_of_the_class() -> None:
    error = dpfix.LoaderError("data_loader is odd.", "it counts.", "pass another.", path="data_loader")
    (finding,) = error.findings
    assert str(error) == "data_loader is odd. it counts. pass another."
    assert (finding.code, finding.path) == (dpfix.LoaderError.code, "data_loader")
    assert (finding.fact, finding.why, finding.help) == ("data_loader is odd.", "it counts.", "pass another.")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.code)
def test_a_rules_error_takes_its_findings(rule: Rule) -> None:
    if "refused" not in {outcome.value for outcome in rule.outcomes}:
        return
    finding = rule.refusal("a fact.", "a reason.", "a way out.", "a.path")
    assert rule.error([finding, finding]).findings == (finding, finding)

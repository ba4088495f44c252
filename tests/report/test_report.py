"""Text, JSON and HTML of a report say the same, from the same fields."""

from __future__ import annotations

import html
import json
from dataclasses import fields

import pytest
from torch import nn

import dpfix
from dpfix.report.finding import Finding, Fixability, Severity
from dpfix.report.report import EngineEvidence, Layer, Proof, Report
from tests.helpers import setting

HOSTILE = "<script>alert('1')</script>"


@pytest.fixture(scope="module")
def report() -> Report:
    layers = (nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ELU(inplace=True), nn.Linear(16, 3))
    return dpfix.make_private_safe(**setting(nn.Sequential(*layers))).report


def test_json_has_every_field_of_every_finding(report: Report) -> None:
    told = json.loads(report.to_json())
    for finding, entry in zip(report.findings, told["findings"], strict=True):
        for field in fields(Finding):
            value = getattr(finding, field.name)
            assert entry[field.name] == getattr(value, "value", value)
    assert {"DPF001", "DPF003"} <= {entry["code"] for entry in told["findings"]}
    assert told["settings"] == report.settings and told["versions"] == report.versions


def test_html_has_everything(report: Report) -> None:
    page = report.to_html()
    told = [report.model, report.engine, *map(str, report.evidence)]
    told += [text for proof in report.proofs for text in (proof.claim, proof.shown, proof.check)]
    told += [text for values in (report.settings, report.versions) for pair in values.items() for text in pair]
    for finding in report.findings:
        told += [finding.code, finding.severity.value, finding.fixability.value]
        told += [finding.path, finding.fact, finding.why, finding.fix, finding.help]
    assert report.settings["clip norm"] and report.versions["torch"] and report.audit and report.evidence
    seen = html.unescape(page)
    assert [text for text in told if text not in seen] == []


def test_text_has_every_finding(report: Report) -> None:
    text = report.details()
    for finding in report.findings:
        assert all(part in text for part in (finding.code, finding.fact, finding.why, finding.fix, finding.help))


def test_names_cannot_write_into_the_page() -> None:
    used: list[str] = []

    def hostile() -> str:
        used.append(HOSTILE.replace("1", str(len(used))))
        return used[-1]

    finding = Finding("DPF001", Severity.ADVICE, Fixability.REFUSED, *(hostile() for _ in range(5)))
    evidence = EngineEvidence("vmap", False, reason=hostile())
    proof = Proof(hostile(), hostile(), hostile(), {hostile(): 1.0})
    layers = (Layer(hostile(), hostile(), hostile()), Layer(hostile(), same := hostile(), same))
    named = {hostile(): hostile()}
    page = Report(
        hostile(), (finding,), hostile(), (evidence,), (proof,), named, {hostile(): hostile()}, layers
    ).to_html()
    assert "<script" not in page
    seen = html.unescape(page)
    assert [text for text in used if text not in seen] == []


def test_empty_report_is_a_page() -> None:
    page = Report("Net").to_html()
    assert "findings (0)" in page and "Engine: none" in page
    assert "Settings" not in page and "audit" not in page

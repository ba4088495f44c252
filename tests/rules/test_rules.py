"""Every rule by its own examples: VALID is left alone, INVALID is found, and repaired where the rule says so."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import dpfix
from dpfix.api import options_of
from dpfix.report.finding import Finding, Fixability, Severity
from dpfix.rules import RULES
from dpfix.scan.scan import Scan
from tests.rules.examples import Example, example

CHANGES = (Fixability.EXACT, Fixability.CHANGES_MODEL)


def examples(kind: str) -> Any:
    """All examples of one kind, with their rules."""
    named = [
        pytest.param(rule, factory, id=f"{rule.CODE}-{number}")
        for rule in RULES
        for number, factory in enumerate(getattr(rule, kind))
    ]
    return pytest.mark.parametrize(("rule", "factory"), named)


def found(rule: ModuleType, given: Example) -> list[Finding]:
    options = options_of({"grad_sample_mode": given.mode})
    return list(rule.find(Scan(given.module, given.optimizer, given.data_loader, *options)))


@examples("VALID")
def test_valid_is_left_alone(rule: ModuleType, factory: Callable[[], Any]) -> None:
    assert all(f.severity is Severity.ADVICE for f in found(rule, example(factory)))
    given = example(factory)
    classes = [type(m) for m in given.module.modules()]
    training = dpfix.make_private_safe(**given.arguments)
    assert not [f for f in training.report.repairs if f.code == rule.CODE]
    assert [type(m) for m in given.module.modules()] == classes


@examples("INVALID")
def test_invalid_is_found(rule: ModuleType, factory: Callable[[], Any]) -> None:
    findings = found(rule, example(factory))
    assert findings
    assert {f.code for f in findings} == {rule.CODE}


@examples("INVALID")
def test_invalid_is_repaired_or_refused(rule: ModuleType, factory: Callable[[], Any]) -> None:
    given = example(factory)
    findings = found(rule, given)
    if any(f.refused for f in findings):
        with pytest.raises(rule.ERROR, match=rule.CODE) as refusal:
            dpfix.make_private_safe(**given.arguments)
        assert rule.CODE in {f.code for f in refusal.value.findings}
        return
    dpfix.make_private_safe(**given.arguments)
    assert not [f for f in found(rule, given) if f.fixability in CHANGES or f.refused]


@examples("INVALID")
def test_repair_keeps_every_parameter(rule: ModuleType, factory: Callable[[], Any]) -> None:
    given = example(factory)
    findings = found(rule, given)
    if given.mode != "auto" or not all(f.fixability in CHANGES for f in findings):
        return  # refused, or Opacus's replacement: see test_replaceable.py
    before = dict(given.module.named_parameters())
    flags = {n: (p.requires_grad, p.dtype) for n, p in before.items()}
    held = [[id(p) for p in group["params"]] for group in given.optimizer.param_groups]
    dpfix.make_private_safe(**given.arguments)
    after = dict(given.module.named_parameters())
    assert before.keys() == after.keys()
    assert all(after[n] is p for n, p in before.items())
    assert flags == {n: (p.requires_grad, p.dtype) for n, p in after.items()}
    assert held == [[id(p) for p in group["params"]] for group in given.optimizer.param_groups]


@examples("INVALID")
def test_message_has_fact_place_why_and_way_out(rule: ModuleType, factory: Callable[[], Any]) -> None:
    for finding in found(rule, example(factory)):
        text = str(finding)
        assert re.match(rf"{rule.CODE} \[(breaks-guarantee|blocks-training|advice)\] \S.{{20,}}", text)
        assert "\n  why:  " in text
        assert "\n  help: " in text or "\n  fix:  " in text
        assert finding.path == "" or f"`{finding.path}`" in text or finding.path.split(".")[0] in text
        assert not finding.refused or finding.help


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.CODE)
def test_rule_is_documented(rule: ModuleType) -> None:
    text = rule.__doc__ or ""
    assert rule.TITLE and issubclass(rule.ERROR, dpfix.DPFixError)
    assert all(f"\n{part}:" in text for part in ("What", "Example", "Use instead", "Fix safety"))
    assert "\nWhy" in text


def test_codes_are_unique() -> None:
    codes = [rule.CODE for rule in RULES]
    assert len(set(codes)) == len(codes)


def test_torch_script_is_refused() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(6, 3)))
    for module in (scripted, nn.Sequential(scripted)):
        with pytest.raises(dpfix.ModelError, match=r"DPF005.*torch.jit script"):
            dpfix.make_private_safe(**example(lambda m=module: {"module": m}).arguments)


def test_compiled_model_is_trained_through_its_original() -> None:
    plain = nn.Sequential(nn.Linear(6, 3))
    given = example(lambda: {"module": plain}).arguments
    training = dpfix.make_private_safe(**given | {"module": torch.compile(plain, backend="eager")})
    assert training[0]._module is plain


def test_compiled_part_is_refused_by_name() -> None:
    model = nn.Sequential(torch.compile(nn.Linear(6, 6), backend="eager"), nn.Linear(6, 3))
    with pytest.raises(dpfix.ModelError, match=r"DPF006.*`0`"):
        dpfix.make_private_safe(**example(lambda: {"module": model}).arguments)

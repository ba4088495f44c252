"""Every rule by its own examples: VALID is left alone, INVALID is found, and repaired where the rule says so."""

from __future__ import annotations

import inspect
import random
import re
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn
from typing_extensions import override

import dpfix
from dpfix.api import options_of
from dpfix.repair.surgery import Surgery
from dpfix.report.finding import Finding, Fixability, Severity
from dpfix.rules import RULES, Rule
from dpfix.rules.rule import run_rules
from dpfix.scan.scan import Scan
from dpfix.weights.origins import dtype_before
from tests.helpers import generators_unchanged
from tests.rules.examples import Example, example

CHANGES = (Fixability.EXACT, Fixability.CHANGES_MODEL)


def examples(kind: str) -> Any:
    """All examples of one kind, with their rules."""
    named = [
        pytest.param(rule, factory, id=f"{rule.code}-{number}")
        for rule in RULES
        for number, factory in enumerate(getattr(rule, kind))
    ]
    return pytest.mark.parametrize(("rule", "factory"), named)


def found(rule: Rule, given: Example) -> list[Finding]:
    options = options_of({"grad_sample_mode": given.mode})
    return list(rule.find(Scan(given.module, given.optimizer, given.data_loader, *options)))


@examples("VALID")
def test_valid_is_left_alone(rule: Rule, factory: Callable[[], Any]) -> None:
    told = found(rule, example(factory))
    assert all(f.severity is Severity.ADVICE for f in told)
    assert not told or len(rule.outcomes) > 1, "a rule that gives advice only must have a case without any"
    given = example(factory)
    classes = [type(m) for m in given.module.modules()]
    training = dpfix.make_private_safe(**given.arguments)
    assert not [f for f in training.report.repairs if f.code == rule.code]
    assert [type(m) for m in given.module.modules()] == classes


@examples("INVALID")
def test_invalid_is_found(rule: Rule, factory: Callable[[], Any]) -> None:
    findings = found(rule, example(factory))
    assert findings
    assert {f.code for f in findings} == {rule.code}


@examples("INVALID")
def test_invalid_is_repaired_or_refused(rule: Rule, factory: Callable[[], Any]) -> None:
    given = example(factory)
    findings = found(rule, given)
    if any(f.refused for f in findings):
        with pytest.raises(rule.error, match=rule.code) as refusal:
            dpfix.make_private_safe(**given.arguments)
        assert rule.code in {f.code for f in refusal.value.findings}
        return
    dpfix.make_private_safe(**given.arguments)
    assert not [f for f in found(rule, given) if f.fixability in CHANGES or f.refused]


@examples("INVALID")
def test_repair_keeps_every_parameter(rule: Rule, factory: Callable[[], Any]) -> None:
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
    assert flags == {n: (p.requires_grad, dtype_before(p)) for n, p in after.items()}
    assert held == [[id(p) for p in group["params"]] for group in given.optimizer.param_groups]


@examples("INVALID")
def test_message_has_fact_place_why_and_way_out(rule: Rule, factory: Callable[[], Any]) -> None:
    for finding in found(rule, example(factory)):
        text = str(finding)
        assert re.match(rf"{rule.code} \[(breaks-guarantee|blocks-training|advice)\] \S.{{20,}}", text)
        assert "\n  why:  " in text
        assert "\n  help: " in text or "\n  fix:  " in text
        assert finding.path == "" or f"`{finding.path}`" in text or finding.path.split(".")[0] in text
        assert not finding.refused or finding.help


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.code)
def test_rule_is_documented(rule: Rule) -> None:
    text = inspect.cleandoc(type(rule).__doc__ or "")
    assert rule.title and issubclass(rule.error, dpfix.DPFixError)
    assert all(f"\n{part}:" in text for part in ("What", "Example", "Use instead"))
    assert "\nWhy" in text
    assert rule.INVALID or rule.remark


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.INVALID], ids=lambda rule: rule.code)
def test_cases_show_the_declared_outcomes(rule: Rule) -> None:
    """What the page declares is what the findings say, no more and no less."""
    shown = {f.fixability for case in (*rule.VALID, *rule.INVALID) for f in found(rule, example(case))}
    assert shown == set(rule.outcomes)


class Draws(Rule):
    """A rule that draws from every generator, while it looks and while it repairs."""

    title = "a layer of six features"
    severity = Severity.BLOCKS_TRAINING
    outcomes: ClassVar = {Fixability.EXACT: "a fresh layer."}

    @override
    def find(self, scan: Scan) -> Iterator[Finding]:
        assert draw()
        for path, module in scan.modules(nn.Linear):
            if module.bias is not None:
                yield self.finding(Fixability.EXACT, f"{path} has a bias.", "it may.", fix="no bias", path=path)

    @override
    def fix(self, module: nn.Module, scan: Scan) -> nn.Module:
        assert draw() and isinstance(module, nn.Linear)
        return nn.Linear(module.in_features, module.out_features, bias=False)

    VALID = ()


def draw() -> bool:
    """One number from every generator; whether they have moved."""
    before = torch.get_rng_state()
    torch.randn(3), np.random.rand(), random.random()
    return not torch.equal(before, torch.get_rng_state())


def test_rules_never_move_the_generators_of_the_script() -> None:
    given = example(lambda: {"module": nn.Sequential(nn.Linear(6, 3))})
    scan = Scan(given.module, given.optimizer, given.data_loader, *options_of({}))
    with generators_unchanged():
        pairs = run_rules(scan, [Draws("DPF999")])
    assert [finding.path for _, finding in pairs] == ["0"]
    with generators_unchanged(), Surgery(scan) as surgery:
        surgery.repair(pairs)
        assert given.module[0].bias is None


def test_a_rule_reports_declared_outcomes_only() -> None:
    with pytest.raises(ValueError, match=r"Draws.outcomes does not declare 'refused'"):
        Draws("DPF999").refusal("a fact.", "a reason.", "a way out.")


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

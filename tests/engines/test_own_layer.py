"""A layer of the user's own in book-keeping: registered in one call, audited like any other, and taken back."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dpfix
from dpfix.choose import select
from dpfix.engines.bookkeeping import ENGINE, Kept, LayerCall, LayerRule, register
from dpfix.engines.bookkeeping.engine import assign
from dpfix.engines.bookkeeping.linear import Linear
from tests.cases import Case, labelled
from tests.helpers import private, released, setting
from tests.reference import clip_norms, clipped_sum, gradients_one_by_one, relative_error


class Bend(nn.Module):
    """``weight x + bend x^2``, feature by feature."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bend = nn.Parameter(torch.ones(width)), nn.Parameter(torch.full((width,), 0.3))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x + self.bend * x**2


class BendRule(LayerRule):
    features = 1
    parameters = ("weight", "bend")

    def __init__(self) -> None:
        self.calls = 0

    def accepts(self, module: nn.Module) -> bool:
        return type(module) is Bend

    def forward(self, call: LayerCall, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        weight, bend = call.module.weight, call.module.bend
        return weight * x + bend * x**2, (x, weight, bend)

    def backward(self, call: LayerCall, saved: tuple[Tensor, ...], g: Tensor, wanted: bool) -> Tensor | None:
        self.calls += 1
        x, weight, bend = saved
        for name, gradient in (("weight", g * x), ("bend", g * x**2)):
            if call.trains(name):
                call.report(name, Kept(self.per_sample(call.rows.matrices(gradient))))
        return g * (weight + 2 * bend * x) if wanted else None

    def per_sample(self, gradients: Tensor) -> Tensor:
        """From ``[samples, positions, features]`` to ``[samples, features]``."""
        return gradients.sum(1)


class MeanRule(BendRule):
    """Wrong for more than one position."""

    def per_sample(self, gradients: Tensor) -> Tensor:
        return gradients.mean(1)


class NeighbourRule(BendRule):
    """Gives a sample the gradient of another one: the sum of the batch is right, what is clipped is not."""

    def per_sample(self, gradients: Tensor) -> Tensor:
        return gradients.sum(1).roll(1, 0)


class Sloppy(BendRule):
    """Forgets a part of the input's gradient."""

    def backward(self, call: LayerCall, saved: tuple[Tensor, ...], g: Tensor, wanted: bool) -> Tensor | None:
        super().backward(call, saved, g, wanted)
        return g * saved[1]


class Bent(nn.Module):
    """The layer several times, with positions, and inside a module that runs under ``vmap``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.head = nn.Linear(6, 4), Within(), nn.Linear(4, 3)
        self.bend = Bend(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bend(torch.tanh(self.first(x)))
        return self.head(self.inner(self.bend(x)).mean(1))


class Within(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.bend = nn.Parameter(torch.ones(4)), Bend(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bend(x * self.scale)


def classify(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


CASE = Case("bent", Bent, labelled(5, 6), classify)


def assert_releases_clipped_sums(engine: str) -> dpfix.PrivateTraining:
    model, training = private(CASE, grad_sample_mode=engine)
    samples = gradients_one_by_one(CASE.plain(), CASE.step, CASE.singles())
    for clip_norm in clip_norms(samples).values():
        found = released(CASE, model, training, clip_norm)
        assert relative_error(found, clipped_sum(samples, clip_norm)) <= 1e-6
    return training


def test_its_clipped_sums_are_right_and_it_is_taken_back() -> None:
    rule = BendRule()
    with register(rule):
        assert_releases_clipped_sums("bookkeeping")
    assert rule.calls
    rule.calls = 0
    assert_releases_clipped_sums("bookkeeping")
    assert not rule.calls


def test_the_handle_takes_it_back_too() -> None:
    rule, later = BendRule(), BendRule()
    handles = [register(rule), register(later)]
    assert_releases_clipped_sums("bookkeeping")
    assert later.calls and not rule.calls, "the last one registered counts"
    handles[1].remove()
    assert_releases_clipped_sums("bookkeeping")
    assert rule.calls
    handles[0].remove()


@pytest.mark.parametrize("rule", [MeanRule(), NeighbourRule(), Sloppy()], ids=lambda r: type(r).__name__)
def test_a_wrong_one_is_refused_by_the_audit(rule: LayerRule) -> None:
    with register(rule):
        with pytest.raises(dpfix.NoEngineError, match="bookkeeping: its clipped sum differs"):
            private(CASE, grad_sample_mode="bookkeeping")
        assert assert_releases_clipped_sums("auto").plan.engine != "bookkeeping"


def test_a_module_with_parameters_that_the_rule_does_not_name_is_not_its() -> None:
    class Short(BendRule):
        parameters = ("weight",)

    rule = Short()
    with register(rule):
        assert_releases_clipped_sums("bookkeeping")
    assert not rule.calls


class Greedy(BendRule):
    """Accepts layers that it cannot compute."""

    parameters = ("weight", "bend")

    def accepts(self, module: nn.Module) -> bool:
        return True


def test_a_rule_that_does_not_name_a_layers_parameters_leaves_it_to_the_engine() -> None:
    modules = {"": nn.Sequential(nn.Linear(2, 2)), "0": nn.Linear(2, 2)}
    rules, expanded = assign([Greedy(), *ENGINE.rules], modules, {"0"}, {})
    assert type(rules["0"]) is Linear and not expanded


def test_only_an_instance_of_a_rule_can_be_registered() -> None:
    with pytest.raises(dpfix.ArgumentError, match=r"not an instance of LayerRule.*register\(MyRule\(\)\)"):
        register(BendRule)  # type: ignore[arg-type]


def test_an_order_of_engines_is_neither_remembered_nor_taken_from_memory_with_a_rule(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DPFIX_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(select, "BUDGET_SECONDS", 60.0)  # on a busy machine, too, several engines are tried
    private(CASE)
    before = sorted(tmp_path.iterdir())
    with register(BendRule()):
        _, training = private(CASE)
    assert before and sorted(tmp_path.iterdir()) == before
    assert not [e for e in training.report.evidence if "timed before" in e.reason]


def test_the_example_in_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs" / "how-it-works.md").read_text()
    (block,) = re.findall(
        r"^```python\n(.*?)^```$", page.split("## A layer of your own")[1].split("\n## ")[0], re.M | re.S
    )
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(block, "how-it-works.md", "exec"), names)
    try:
        model = nn.Sequential(nn.Linear(6, 4), names["Scale"](4), nn.Tanh(), nn.Linear(4, 3))
        training = dpfix.make_private_safe(**setting(model, grad_sample_mode="bookkeeping"))
        assert training.plan.engine == "bookkeeping"
        assert type(vars(model[1])["forward"].rule).__name__ == "ScaleRule"
    finally:
        names["handle"].remove()

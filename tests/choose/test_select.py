"""Which engine `auto` takes: the fastest that is right, and batches of one only where none of the others is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dpfix
from dpfix.choose import select, timing
from dpfix.engines import ENGINES, Engine
from dpfix.plan import Plan
from dpfix.report.report import EngineEvidence
from tests.cases import mlp
from tests.helpers import setting


def evidence_of(training: dpfix.PrivateTraining) -> dict[str, EngineEvidence]:
    return {e.engine: e for e in training.report.evidence}


@pytest.fixture
def at_work(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the engines that were put to work, in order."""
    seen: list[str] = []
    for engine in ENGINES.values():

        def noted(module: nn.Module, plan: Plan, prepared: Any = None, engine: Any = engine) -> Any:
            seen.append(engine.name)
            return type(engine).attach(engine, module, plan, prepared)

        monkeypatch.setattr(engine, "attach", noted)
    return seen


class Branching(nn.Module):
    """A sample decides about its own layer: only batches of one follow that."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.own = nn.Linear(6, 8), nn.Linear(8, 3), nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        rows = [self.own * row if row.sum() > 0 else row for row in self.a(x)]
        return self.b(torch.stack(rows))


def test_batches_of_one_are_not_tried_where_another_engine_is_right(
    at_work: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However fast they would be: a probe batch is small, and their time grows with its size."""
    monkeypatch.setattr(timing, "_seconds", lambda engine, *rest: 0.0 if engine.name == "microbatch" else 1.0)
    training = dpfix.make_private_safe(**setting(mlp(), cache=False))
    assert training.plan.engine != "microbatch" and "microbatch" not in at_work
    told = evidence_of(training)["microbatch"]
    assert not told.passed
    assert str(told) == (
        f"microbatch: not used: not tried, it is the last resort and `{training.plan.engine}` is right"
    )
    assert str(told) in training.report.details()


def test_batches_of_one_are_taken_where_no_other_engine_can_follow(at_work: list[str]) -> None:
    def told(model: nn.Module, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    training = dpfix.make_private_safe(**setting(Branching(), cache=False, training_step=told))
    assert training.plan.engine == "microbatch"
    evidence = evidence_of(training)
    assert evidence["microbatch"].passed
    assert all(not e.passed and "not tried" not in e.reason for n, e in evidence.items() if n != "microbatch")
    assert at_work.index("microbatch") > max(at_work.index(n) for n in set(at_work) - {"microbatch"})


def test_batches_of_one_are_taken_where_the_others_fail_on_harder_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    original = select._confirm

    def confirm(engine: Engine, *rest: Any) -> Iterator[EngineEvidence]:
        if engine.name == "microbatch":
            yield from original(engine, *rest)
        else:
            yield EngineEvidence(engine.name, passed=False, reason="wrong for an outlier")

    monkeypatch.setattr(select, "_confirm", confirm)
    training = dpfix.make_private_safe(**setting(mlp()))
    assert training.plan.engine == "microbatch"
    assert evidence_of(training)["bookkeeping"].reason == "wrong for an outlier"
    again = dpfix.make_private_safe(**setting(mlp()))
    assert again.plan.engine == "microbatch", "what was remembered is the fastest, not the one that is right"


def test_batches_of_one_can_be_asked_for() -> None:
    training = dpfix.make_private_safe(**setting(mlp(), grad_sample_mode="microbatch"))
    assert training.plan.engine == "microbatch"
    assert [e.engine for e in training.report.evidence] == ["microbatch"]

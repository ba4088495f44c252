"""Remembering the fastest engine: it saves the timing, never the proof, and holds no data."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dpfix
from dpfix.choose import plan_cache, timing
from dpfix.engines import ENGINES
from tests.cases import mlp
from tests.helpers import points, setting


def files() -> list[Path]:
    return sorted(Path(os.environ["DPFIX_CACHE_DIR"]).glob("*"))


@pytest.fixture
def timings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many engines were timed, call by call."""
    seen: list[int] = []
    original = timing._time

    def counted(engines: Any, *rest: Any) -> Any:
        seen.append(len(engines))
        return original(engines, *rest)

    monkeypatch.setattr(timing, "_time", counted)
    return seen


def test_the_second_run_is_not_timed_but_audited(timings: list[int]) -> None:
    def told(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    first = dpfix.make_private_safe(**setting(mlp(), training_step=told))
    second = dpfix.make_private_safe(**setting(mlp(), training_step=told))
    assert len(timings) == 1 and second.plan.engine == first.plan.engine
    evidence = {e.engine: e for e in second.report.evidence}
    assert set(evidence) == set(ENGINES)
    chosen = evidence[second.plan.engine]
    assert chosen.passed and chosen.max_error is not None
    others = {name: e.reason for name, e in evidence.items() if e is not chosen}
    assert "last resort" in others.pop("microbatch")
    assert all("timed before" in reason for reason in others.values())


def test_what_is_remembered_holds_engines_and_times_only() -> None:
    dpfix.make_private_safe(**setting(mlp()))
    (file,) = files()
    content = json.loads(file.read_text())
    assert set(content) == {"seconds"} and set(content["seconds"]) <= set(ENGINES)


def test_cache_can_be_turned_off(timings: list[int]) -> None:
    for _ in range(2):
        dpfix.make_private_safe(**setting(mlp(), cache=False))
    assert len(timings) == 2 and not files()


@pytest.mark.parametrize("content", ["", "{}", '{"seconds": {"teleport": 1}}', '{"seconds": {"hooks": "fast"}}', "[1]"])
def test_a_broken_file_is_overwritten(content: str, timings: list[int]) -> None:
    dpfix.make_private_safe(**setting(mlp()))
    (file,) = files()
    file.write_text(content)
    dpfix.make_private_safe(**setting(mlp()))
    assert len(timings) == 2 and json.loads(file.read_text())["seconds"]


def test_an_engine_that_was_remembered_wrongly_is_not_used() -> None:
    class Sum(nn.Module):
        """Hooks see nothing of a parameter that is used twice."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(nn.functional.linear(self.a(x).tanh(), self.a.weight))

    dpfix.make_private_safe(**setting(Sum()))
    (file,) = files()
    file.write_text(json.dumps({"seconds": {"hooks": 0.001}}))
    training = dpfix.make_private_safe(**setting(Sum()))
    assert training.plan.engine != "hooks"


def test_other_shapes_and_frozen_parts_are_other_models() -> None:
    def key(model: nn.Module, features: int = 6) -> str:
        return plan_cache.key(model, (points(4, features).tensors[0],))

    frozen = mlp()
    frozen[0].weight.requires_grad_(False)
    other = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    assert key(mlp()) == key(mlp())
    assert len({key(mlp()), key(mlp(), 7), key(frozen), key(other), key(mlp().double())}) == 5
    noisy = mlp()
    with torch.no_grad():
        noisy[0].weight.add_(1)
    assert key(noisy) == key(mlp()), "values of parameters do not matter"


def test_a_folder_that_cannot_be_written_to_is_no_reason_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "file"
    place.write_text("")
    monkeypatch.setenv("DPFIX_CACHE_DIR", str(place))
    dpfix.make_private_safe(**setting(mlp()))

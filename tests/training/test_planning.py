"""Plans for a budget: the noise that a training would get, the ratio that decides, and numbers that cannot be used."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from torch.utils.data import DataLoader

import dpfix
from dpfix.choose import select, timing
from tests.helpers import points, setting, sgd

GIVEN: dict[str, Any] = {
    "samples": 24, "epochs": 4, "batch_sizes": [4, 8, 24], "target_epsilon": 3.0, "target_delta": 1e-3,
}  # fmt: skip


@pytest.mark.parametrize("sampling", ["poisson", "truncated", "shuffle", "fixed"])
def test_a_plan_is_what_the_call_does(sampling: str) -> None:
    (row,) = dpfix.plan(**GIVEN | {"batch_sizes": [8], "sampling": sampling}).rows
    given = setting(data_loader=DataLoader(points(), batch_size=8), sampling=sampling)
    given.pop("noise_multiplier")
    training = dpfix.make_private_safe_with_epsilon(**given, target_epsilon=3.0, target_delta=1e-3, epochs=4)
    assert row.noise_multiplier == training[1].noise_multiplier
    assert row.steps == 12 and row.sampling_rate == 1 / 3
    assert 2.9 < row.epsilon <= 3.0


def test_larger_batches_have_less_noise_for_each_sample() -> None:
    plans = dpfix.plan(**GIVEN)
    ratios = [row.noise_to_batch for row in plans.rows]
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[0] == plans.rows[0].noise_multiplier / 4
    table = str(plans).splitlines()
    assert len(table) == 5 and "noise/batch" in table[1] and table[2].split()[0] == "4"


def test_a_large_delta_is_named() -> None:
    assert "1 / samples = 0.042" in str(dpfix.plan(**GIVEN | {"target_delta": 0.1}))


def test_the_picture_is_written(tmp_path: Path) -> None:
    dpfix.plan(**GIVEN).picture(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"samples": 0}, "samples: 0 is not a whole number from 1"),
        ({"samples": math.nan}, "samples: nan"),
        ({"batch_sizes": [8, 25]}, "batch_sizes: 25 is not a whole number from 1 to samples=24"),
        ({"batch_sizes": [2.5]}, "batch_sizes: 2.5"),
        ({"batch_sizes": []}, "names no batch size"),
        ({"batch_sizes": 8}, "names no batch size"),
        ({"epochs": -1}, "epochs=-1"),
        ({"target_epsilon": None}, "target_epsilon=None"),
        ({"target_delta": 1.5}, "delta=1.5"),
        ({"sampling": "all"}, "'all' is not one of"),
        ({"target_epsilon": 1e-9}, "target_epsilon=1e-09 at target_delta=0.001 cannot be reached in 24 steps"),
    ],
)
def test_numbers_that_cannot_be_used(wrong: dict[str, Any], text: str) -> None:
    with pytest.raises(dpfix.DPFixError, match=text):
        dpfix.plan(**GIVEN | wrong)


# ------------------------------------------------------------------ time

ROWS = [dpfix.PlannedTraining(size, size / 24, 96 // size, 1.0, 2.9, (1.0, size / 24, 96 // size)) for size in (4, 8)]
PLANS = dpfix.TrainingPlans(24, 4, 3.0, 1e-3, "poisson", tuple(ROWS))


@pytest.mark.parametrize("call", ["training", "again", "diagnosis"])
def test_the_time_comes_from_the_report(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPFIX_CACHE_DIR", str(tmp_path))
    report = dpfix.make_private_safe(**setting()).report
    if call == "again":  # its engine is remembered, and not timed again
        report = dpfix.make_private_safe(**setting()).report
    elif call == "diagnosis":
        given = setting()
        report = dpfix.diagnose(**{name: given[name] for name in ("module", "optimizer", "data_loader", "criterion")})
    (engine,) = [tried for tried in report.evidence if tried.engine == report.engine]
    assert engine.seconds and engine.samples == 8
    plans = PLANS.timed(report)
    for row in plans.rows:
        assert row.seconds == pytest.approx(row.steps * row.batch_size * engine.seconds / 8)
    head = str(plans).splitlines()[1].split()
    assert head[-1] == ("memory" if call == "training" else "time") and "time" in head
    assert "time" not in str(PLANS)


def test_the_time_comes_from_a_number() -> None:
    assert PLANS.timed(0.5).rows[1].seconds == 12 * 8 * 0.5
    shown = [str(PLANS.timed(seconds)).splitlines()[2].split()[-2:] for seconds in (0.5, 5.0, 500.0)]
    assert shown == [["48", "s"], ["8", "min"], ["13.3", "h"]]


@pytest.mark.parametrize("engine", ["bookkeeping", "vmap"])
def test_memory_is_what_a_step_on_a_larger_batch_holds(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line through 8 and 16 samples tells what the same engine holds with 32."""
    monkeypatch.setattr(select, "BUDGET_SECONDS", 60.0)
    monkeypatch.setattr(
        timing, "in_order", lambda *_: {engine: 0.1, "bookkeeping": 0.2} if engine == "vmap" else {engine: 0.1}
    )
    model = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))

    def report_for(batch_size: int) -> dpfix.Report:
        loader = DataLoader(points(64), batch_size=batch_size)
        return dpfix.diagnose(module=model, data_loader=loader, optimizer=sgd(model), criterion=nn.CrossEntropyLoss())

    small, large = report_for(16), report_for(32)
    assert small.engine == large.engine == engine
    row = dpfix.PlannedTraining(32, 0.5, 2, 1.0, 1.0, (1.0, 0.5, 2))
    (planned,) = dpfix.TrainingPlans(64, 1, 3.0, 1e-3, "poisson", (row,)).timed(small).rows
    (wanted,) = [tried.memory for tried in large.evidence if tried.engine == engine]
    assert planned.memory == pytest.approx(wanted, rel=0.1)


def test_a_number_says_nothing_of_memory() -> None:
    plans = PLANS.timed(0.5)
    assert plans.rows[0].memory is None and "memory" not in str(plans)


def test_a_report_without_a_time_is_refused() -> None:
    report = dpfix.make_private_safe(**setting(grad_sample_mode="hooks")).report
    with pytest.raises(dpfix.ArgumentError, match=r"no time of its engine \(hooks\)"):
        PLANS.timed(report)
    with pytest.raises(dpfix.ArgumentError, match="timing=-1"):
        PLANS.timed(-1)

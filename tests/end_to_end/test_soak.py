"""The measurement of long use: its quick form finds nothing wrong, and each part finds what is wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.common import tables
from benchmarks.soak import __main__ as soak
from benchmarks.soak import calls, canary, files, noise, steps

ROOT = Path(__file__).parents[2]
silent = pytest.mark.filterwarnings("ignore")


def test_the_page_has_every_part_and_nothing_wrong() -> None:
    page = tables.written(ROOT / "docs/reliability.md")
    assert [title for title in soak.TITLES.values() if f"## {title}\n" not in page] == []
    assert "**wrong**" not in page


def test_sections_are_replaced_one_by_one(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table begins -->\n<!-- table ends -->\nafter\n")
    soak.write(page, {"Noise": ["", "old", ""]})
    soak.write(page, {"Kills while saving": ["", "none", ""], "Noise": ["", "new", ""]})
    assert tables.written(page) == "## Kills while saving\n\nnone\n\n## Noise\n\nnew"
    assert page.read_text().startswith("before\n") and page.read_text().endswith("\nafter\n")


@silent
def test_kills_and_hostile_files() -> None:
    assert files.kills(2).wrong == [] and files.hostile().wrong == []


@silent
def test_calls_at_random_and_interrupts() -> None:
    assert calls.at_random(10, seed=3).wrong == []
    part = calls.with_interrupts(6, seed=3)
    assert part.wrong == [] and part.lines[-1] == "| all | | 6 | 0 |"


# ------------------------------------------------------------------ noise


@silent
@pytest.mark.parametrize("engine", noise.ENGINES)
def test_noise_of_an_engine(engine: str) -> None:
    part = noise.measure(30, (engine,))
    assert part.wrong == []
    assert sum("1.0" in line or "0.99" in line for line in part.lines) == len(noise.CLIPPINGS) + 1  # none is refused


@silent
def test_noise_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch.randn(50, 4000, dtype=torch.float64)
    assert noise.Statistics.of(right).wrong() == []
    for wrong, told in (
        (right * 1.02, "standard deviation"),
        ((torch.rand(50, 4000, dtype=torch.float64) - 0.5) * 12**0.5, "not normal"),
        (torch.cat([right[:1], (right[1:] + 0.2 * right[:-1]) / 1.04**0.5]), "correlated"),
    ):
        assert [fact for fact in noise.Statistics.of(wrong).wrong() if told in fact]
    monkeypatch.setattr(noise, "claimed", lambda optimizer, clipping: noise.MULTIPLIER * noise.NORM * 1.02)
    assert len(noise.measure(30, ("bookkeeping",)).wrong) >= 2


# ------------------------------------------------------------------ canary


def test_the_lower_bound_is_one() -> None:
    """For Gaussian mechanisms, whose epsilon at delta = 1e-3 is known: 1.92 for a shift of 0.67."""
    draw = np.random.default_rng(1)
    bounds = [canary.lower_bound(draw.normal(0.67, 1, 1000), draw.normal(0, 1, 1000)).epsilon for _ in range(7)]
    assert max(bounds) < 1.92 and np.median(bounds) > 0.2
    assert canary.lower_bound(draw.normal(2.67, 1, 1000), draw.normal(0, 1, 1000)).epsilon > 2.5
    assert canary.lower_bound(draw.normal(0, 1, 1000), draw.normal(0, 1, 1000)).epsilon < 0.3
    assert canary.lower_bound(draw.normal(-2.67, 1, 1000), draw.normal(0, 1, 1000)).epsilon == 0.0


@silent
def test_the_canary_finds_crops_that_are_clipped_one_by_one() -> None:
    once, crops = canary.ROWS[2:]
    assert canary.measure(400, rows=(once, crops)).wrong == []
    name, library, _, broken = crops
    assert canary.measure(30, rows=((name, library, 1, broken),)).wrong


@silent
def test_the_canary_does_not_refute_dpfix() -> None:
    assert canary.measure(8, rows=canary.ROWS[:2]).wrong == []


@silent
def test_the_canary_moves_dpfix_by_one_clip_norm_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many crops; without noise the score is the sensitivity that the claim is about."""
    monkeypatch.setattr(canary, "MULTIPLIER", 0.0)
    for crops in (1, canary.CROPS):
        assert canary.score(canary.with_dpfix, True, crops)[0] == pytest.approx(canary.STEPS, rel=0.01)
        assert canary.score(canary.with_dpfix, False, crops)[0] == pytest.approx(0.0, abs=1e-5)
    assert canary.score(canary.with_opacus, True, 4)[0] == pytest.approx(4 * canary.STEPS, rel=0.01)


# ------------------------------------------------------------------ long trainings


def test_steps_of_a_model() -> None:
    assert steps.measure(60, ["MLP"]).wrong == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, []),
        ({"refused": 3}, ["3 steps were refused"]),
        ({"accounted": 99}, ["99 steps in the accountant, and 100 draws"]),
        ({"end": steps.Use(200.0, 6)}, ["memory grew from 102 to 200 MiB"]),
        ({"end": steps.Use(103.0, 9)}, ["6 open files became 9"]),
    ],
)
def test_what_may_not_be_is_told(changes: dict[str, object], told: list[str]) -> None:
    end = changes.pop("end", steps.Use(103.0, 6))
    given = {"engine": "vmap", "draws": 100, "empty": 13, "refused": 0, "accounted": 100} | changes
    assert steps.Long(**given, uses=(steps.Use(100.0, 6), steps.Use(102.0, 6), end)).wrong() == told  # type: ignore[arg-type]

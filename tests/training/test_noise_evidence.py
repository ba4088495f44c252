"""The statistics of the noise: right noise is refused as rarely as they say, wrong noise as soon as they say."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dpfix.training.noise_evidence import CELLS, FALSE_ALARM, PRINT, RATIOS, Repeats, SizeEvidence

COUNTS = np.array([512, 16, 3, 1])


def first_alarm(
    evidence: SizeEvidence, steps: int, draw: np.random.Generator, ratio: float = 1.0, since: int = 0
) -> int | None:
    """The step of the alarm, when the noise of all parameters is ``ratio`` times too large from a step on."""
    for step in range(1, steps + 1):
        squares = draw.chisquare(COUNTS) * (ratio**2 if step > since else 1)
        if evidence.add(COUNTS, squares) is not None:
            return step
    return None


def test_false_alarms_are_as_rare_as_said() -> None:
    """With a bound that can be simulated: 20 %, over 1,000 trainings of 200 steps."""
    draw = np.random.default_rng(1)
    alarms = sum(first_alarm(SizeEvidence(len(COUNTS), 0.2), 200, draw) is not None for _ in range(1000))
    assert 0 < alarms <= 200, "none at all would mean that the test sees nothing"


def test_the_bets_and_stakes_are_a_martingale() -> None:
    """Their mean stays 1: after one step of one number, for a wrong standard deviation near the right one."""
    draw = np.random.default_rng(1)
    near = RATIOS.index(0.8)
    bets = []
    for square in draw.chisquare(1, 20_000):
        evidence = SizeEvidence(1)
        evidence.add(np.array([1]), np.array([square]))
        bets.append(math.exp(evidence._bets[0, near]))
    assert np.mean(bets) == pytest.approx(1 / 2, abs=0.01), "the stake of the first step"


@pytest.mark.slow
def test_a_very_long_training_of_right_noise_gives_no_alarm() -> None:
    draw = np.random.default_rng(2)
    for _ in range(5):
        assert first_alarm(SizeEvidence(len(COUNTS)), 200_000, draw) is None


@pytest.mark.parametrize("ratio", [0.95, 1.05, 0.5, 1.4142, 0.9])
@pytest.mark.parametrize("since", [0, 100, 3000])
def test_wrong_noise_is_found_after_the_numbers_that_are_said(ratio: float, since: int) -> None:
    def numbers(t: int) -> float:
        yielded = (ratio**2 - 1 - math.log(ratio**2)) / 2
        return (math.log(1 / FALSE_ALARM) + math.log(2 * len(RATIOS)) + 2 * math.log(t)) / yielded

    draw = np.random.default_rng(3)
    needed = [
        first_alarm(SizeEvidence(len(COUNTS)), since + 200, draw, ratio, since) - since  # type: ignore[operator]
        for _ in range(5)
    ]
    assert np.mean(needed) <= 1.5 * numbers(since + 1) / COUNTS.sum() + 1


def test_deviations_that_no_decision_depends_on_are_never_found() -> None:
    """Rounding and the generators' own errors are a thousand times smaller."""
    draw = np.random.default_rng(4)
    assert first_alarm(SizeEvidence(len(COUNTS)), 5000, draw, ratio=1.01) is None


def test_a_number_that_is_none_is_an_alarm() -> None:
    assert SizeEvidence(2).add(np.array([1, 1]), np.array([1.0, np.nan])) is not None


# ------------------------------------------------------------------ repeats

SIZES = (3, 20, 20)
"""Numbers of three parameters, of which the first 3, 8 and 8 are compared."""


def right(draw: np.random.Generator, std: float = 1.0) -> list[float]:
    return (std * draw.standard_normal(19)).tolist()


def test_noise_that_comes_again_is_found_in_spite_of_rounding() -> None:
    draw = np.random.default_rng(5)
    missed = 0
    for _ in range(300):
        repeats, noise = Repeats(SIZES), right(draw)
        assert repeats.add(noise, 1) is None
        for step in range(2, 20):
            assert repeats.add(right(draw), step) is None
        again = repeats.add([a + b for a, b in zip(noise, right(draw, 1e-7), strict=True)], 20)
        missed += again is None
        assert again is None or (again[0][0], again[1][0]) == (20, 1)
    assert missed <= 1


def test_a_part_that_comes_again_is_found_and_named() -> None:
    draw = np.random.default_rng(6)
    repeats, first, second = Repeats(SIZES), right(draw), right(draw)
    second[11:] = first[3:11]
    assert repeats.add(first, 1) is None
    assert repeats.add(second, 2) == ((2, 2), (1, 1))


def test_numbers_that_are_not_known_are_not_compared() -> None:
    repeats, drowned = Repeats(SIZES), [math.nan] * 19
    for step in range(3):
        assert repeats.add(drowned, step) is None


def test_independent_noise_shares_cells_as_rarely_as_said() -> None:
    draw = np.random.default_rng(7)
    first, second = np.floor(draw.standard_normal((2, 4_000_000)) * CELLS)
    assert np.mean(first == second) == pytest.approx(1 / (CELLS * 2 * math.sqrt(math.pi)), rel=0.15)
    assert (1 / (CELLS * 2 * math.sqrt(math.pi))) ** PRINT * 1e9**2 / 2 < 1e-9 - FALSE_ALARM


def test_no_more_fingerprints_are_kept_than_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last ones are kept: noise comes again within them, and is known; memory ends there."""
    monkeypatch.setattr("dpfix.training.noise_evidence.KEPT", 20)
    draw, repeats = np.random.default_rng(3), Repeats(SIZES)
    noises = [right(draw) for _ in range(50)]
    assert [repeats.add(noise, step) for step, noise in enumerate(noises, 1)] == [None] * 50
    assert max(map(len, (repeats._by_step, repeats._by_part))) <= 20
    assert repeats.add(noises[-5], 51) is not None

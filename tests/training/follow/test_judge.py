"""Which samples are looked at in a check."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch

from dpfix.layout.sample_dim import SampleDim
from dpfix.training.follow.calls import ModelCall, Output
from dpfix.training.follow.judge import SAMPLES, exchanges, replacements
from dpfix.training.follow.step import RealStep


def step_of(gradient: torch.Tensor) -> RealStep:
    out = torch.zeros_like(gradient, requires_grad=True).clone()
    call = ModelCall((), {}, out, None, len(gradient), None, [Output(out, None, SampleDim(0), 0)])
    return RealStep(out.sum(), None, (call,), len(gradient), ((gradient,),), (), "")


def test_samples_that_the_loss_feels_most_and_least_are_always_looked_at() -> None:
    gradient = torch.ones(64, 3)
    gradient[41], gradient[17] = 9, 0
    for seed in range(50):
        kept = {e.keep for e in exchanges(step_of(gradient), Random(seed))}
        assert {41, 17} <= kept and len(kept) == SAMPLES


def test_all_of_few_samples_are_looked_at() -> None:
    for samples in (2, 3, 5):
        assert {e.keep for e in exchanges(step_of(torch.rand(samples, 3)), Random(0))} == set(range(samples))


@pytest.mark.parametrize("of", [exchanges, replacements])
def test_whichever_sample_the_others_feel_it_is_gone_somewhere(of: Any) -> None:
    """The largest of a batch, by which all are divided: a batch without it, in which somebody else is looked at."""
    for samples in (3, 4, 8, 50):
        gradient = torch.ones(samples, 3)
        gradient[1], gradient[2] = 9, 0
        for seed in range(50):
            made = [e for e in of(step_of(gradient), Random(seed)) if e.extreme is None]
            assert all(e.order[e.keep] == e.keep for e in made)
            for felt in range(samples):
                assert any(felt not in e.order for e in made), (samples, felt)


def test_of_two_samples_each_is_looked_at_without_the_other() -> None:
    made = {e.keep: e.order for e in replacements(step_of(torch.rand(2, 3)), Random(0))}
    assert made == {0: (0, 0), 1: (1, 1)}

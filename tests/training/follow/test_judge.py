"""Which samples are looked at in a check."""

from __future__ import annotations

from random import Random

import torch

from dpfix.layout.sample_dim import SampleDim
from dpfix.training.follow.calls import ModelCall, Output
from dpfix.training.follow.judge import SAMPLES, exchanges
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

"""Gradients come from the engine, are released as they came, and are finite."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dpfix
from tests.helpers import train
from tests.training.steps import every_engine, first_batch, loss_of, refused, start


@every_engine
def test_edited_gradients_are_announced(engine: str) -> None:
    model, training = start(engine)
    loss_of(training, first_batch(training)).backward()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.warns(dpfix.DPFixWarning, match=r"p\.grad of `0\.weight` was changed"):
        training[1].step()


def test_penalty_on_weights_is_refused() -> None:
    model, training = start("microbatch")
    penalty = sum(p.square().sum() for p in model.parameters())
    (loss_of(training, first_batch(training)) + penalty).backward()
    refused(model, dpfix.PlanBrokenError, "weight_decay", training[1].step)


@every_engine
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradient_that_is_not_finite_is_refused(engine: str, value: float) -> None:
    model, training = start(engine)
    (loss_of(training, first_batch(training)) * value).backward()
    generator = torch.get_rng_state()
    refused(model, dpfix.NonFiniteGradientError, "not finite", training[1].step)
    assert torch.equal(torch.get_rng_state(), generator), "no noise was drawn"
    training[1].zero_grad()
    assert train(training, 2) == 2


def _first_backward() -> Any:
    model, training = start("bookkeeping")
    loss_of(training, first_batch(training)).backward()
    return model, training


def test_a_loop_that_logs_gradient_norms_before_the_step_is_told_why_there_are_none() -> None:
    model, _ = _first_backward()
    with pytest.raises(dpfix.MisuseError, match=r"reads p.grad .* where it is None.*Read p.grad after step\(\)"):
        sum(p.grad.norm() for p in model.parameters())  # type: ignore[union-attr]


@pytest.mark.parametrize("mode", ["auto", "bookkeeping", "hooks", "microbatch"])
def test_a_plain_loop_that_clips_is_warned_once(mode: str) -> None:
    private, optimizer, loader = start(mode)[1]
    with pytest.warns(dpfix.DPFixWarning, match="clip_grad_norm_") as told:
        for _ in range(2):
            for x, y in loader:
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(private(x), y).backward()
                torch.nn.utils.clip_grad_norm_(private.parameters(), 1.0)
                optimizer.step()
    assert len([w for w in told if "clip_grad_norm_" in str(w.message)]) == 1


def test_clip_grad_norm_warns_once() -> None:
    model, training = _first_backward()
    with pytest.warns(
        dpfix.DPFixWarning, match="max_grad_norm of make_private_safe takes the place of clip_grad_norm_"
    ) as told:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert [p.grad for p in model.parameters() if p.grad is not None] == []
    assert len(told) == 1
    training[1].step()
    assert all(p.grad is not None and p.grad.norm() >= 0 for p in model.parameters())  # after the step they are there

"""How the loop may call optimizers."""

from __future__ import annotations

import copy

import torch

import dpfix
from tests.cases import mlp
from tests.training.steps import every_engine, first_batch, loss_of, refused, start, values


@every_engine
def test_step_of_the_original_optimizer_is_refused(engine: str) -> None:
    model, training = start(engine)
    loss_of(training, first_batch(training)).backward()
    refused(model, dpfix.MisuseError, "past the private optimizer", training[1].original_optimizer.step)
    training[1].step()


def test_grad_scaler_is_refused() -> None:
    model, training = start()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(training, first_batch(training))).backward()
    refused(model, dpfix.MisuseError, "GradScaler", lambda: scaler.step(training[1]))


@every_engine
def test_zero_grad_of_a_model_that_is_not_wrapped_clears_what_the_optimizers_does(engine: str) -> None:
    trained, untrained = [], mlp()
    for by_model in (False, True):
        model, training = start(engine, model=copy.deepcopy(untrained), wrap_model=False, noise_multiplier=0.0, seed=1)
        for batch in training[2]:
            loss_of((model,), batch).backward()
            training[1].step()
            (model if by_model else training[1]).zero_grad()
        trained.append(values(model))
        training[0].cleanup()
        assert "zero_grad" not in vars(model)
    assert torch.allclose(*trained)

"""How the loop may call optimizers."""

from __future__ import annotations

import torch

import dpfix
from tests.training.steps import every_engine, first_batch, loss_of, refused, start


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

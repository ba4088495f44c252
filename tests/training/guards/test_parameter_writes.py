"""Parameters stay as they are between the forward pass and the step."""

from __future__ import annotations

import torch

import dpfix
from tests.training.steps import every_engine, first_batch, loss_of, refused, start, values


@every_engine
def test_parameters_written_to_before_the_step_are_refused(engine: str) -> None:
    """A step to the worst case nearby (SAM) moves along gradients without noise."""
    model, training = start(engine)
    training[1].zero_grad()
    loss_of(training, first_batch(training)).backward()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05)
    refused(model, dpfix.MisuseError, "written to between the model's forward pass", training[1].step)


@every_engine
def test_parameters_may_be_written_to_after_the_step(engine: str) -> None:
    """Weight decay by hand, averaging and clamping are post-processing."""
    model, training = start(engine)
    for _, batch in zip(range(2), training[2], strict=False):
        training[1].zero_grad()
        loss_of(training, batch).backward()
        training[1].step()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.9).clamp_(-1, 1)
    assert values(model).abs().max() <= 1

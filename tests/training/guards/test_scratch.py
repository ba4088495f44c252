"""Nothing of a batch stays on the model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import dpfix
from tests.helpers import setting
from tests.training.steps import every_engine, first_batch, loss_of, start


class Remembers(nn.Module):
    """Its loop reads an auxiliary loss from attributes that every forward pass sets anew (deep supervision does so)."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.side, self.head = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 3)
        self.heads: list[Tensor] = [torch.zeros(1)]
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(x))
        self.heads[0], self.last = self.side(hidden), hidden.detach()
        return self.head(hidden) + self.heads[0]


@every_engine
def test_what_forward_keeps_of_a_batch_is_gone_after_the_step(engine: str) -> None:
    model = Remembers()
    heads = model.heads
    _, training = start(engine, model=model)
    batch = first_batch(training)
    loss_of(training, batch).backward()
    assert model.last is not None  # the loop may read it until it makes its step
    training[1].step()
    assert model.last is None and model.heads is heads and torch.equal(heads[0], torch.zeros(1))
    assert any(f.code == "DPF025" and "`heads`" in f.fact for f in training.report.findings)


class FeelsTheLast(nn.Module):
    """One number of a gradient of half a million depends on the batch before."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(6, 80_000), nn.Linear(80_000, 3)
        self.last: Tensor | None = None
        with torch.no_grad():
            self.body.weight[3, 5] = 0

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body(x)
        out = self.head(hidden.relu())
        if self.last is not None:
            out = out + 1e-2 * torch.eye(3)[0] * self.last * self.body.weight[3, 5]
        self.last = hidden.detach().abs().mean()
        return out


def test_an_attribute_that_moves_one_number_of_a_large_gradient_is_no_scratch() -> None:
    with pytest.raises(dpfix.StateWrittenError, match="`last`"):
        dpfix.make_private_safe(**setting(FeelsTheLast()))

"""Putting tensors in the place of parameters leaves nothing behind in the model."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dpfix
from tests.helpers import setting


class Reader(nn.Module):
    """An LSTM, which keeps a list of its weights that it makes anew when they are other tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.last = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.lstm(x)[0][:, -1])


@pytest.mark.parametrize("mode", ["auto", "microbatch", "vmap"])
def test_lstm_keeps_its_own_weights(mode: str) -> None:
    """Also after vmap was tried in vain: tensors of its own would stay in memory, and forbid every copy of the model."""
    model = Reader()
    loader = DataLoader(TensorDataset(torch.randn(16, 6, 4), torch.arange(16) % 3), batch_size=4)
    given = setting(model, data_loader=loader, grad_sample_mode=mode)
    own = [id(p) for p in model.lstm.parameters()]
    if mode == "vmap":
        with pytest.raises(dpfix.NoEngineError):
            dpfix.make_private_safe(**given)
    else:
        private, optimizer, batches = dpfix.make_private_safe(**given)
        x, y = next(iter(batches))
        nn.functional.cross_entropy(private(x), y).backward()
        optimizer.step()
        private.to_standard_module()
    assert [id(w) for w in model.lstm._flat_weights] == own
    copied, file = copy.deepcopy(model), io.BytesIO()
    torch.save(model, file)
    x = torch.randn(2, 6, 4)
    assert torch.equal(copied(x), model(x))

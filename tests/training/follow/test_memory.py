"""What is written down of a step holds nothing of an evaluation."""

from __future__ import annotations

from weakref import ref

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import dpfix
from tests.cases import mlp
from tests.helpers import sgd


def test_an_evaluation_between_steps_is_freed_as_it_goes() -> None:
    model = mlp()
    data = TensorDataset(torch.randn(24, 6), torch.arange(24) % 3)
    private, optimizer, loader = dpfix.make_private_safe(
        module=model,
        optimizer=sgd(model),
        data_loader=DataLoader(data, batch_size=8),
        criterion=F.cross_entropy,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(private(x), y).backward()
        optimizer.step()
    held = []
    with torch.no_grad():
        for _ in range(3):
            inputs = torch.randn(5, 6)
            held += [ref(inputs), ref(private(inputs))]
    del inputs
    assert [thing() for thing in held] == [None] * 6

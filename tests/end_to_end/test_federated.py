"""Rounds of federated training, each in a process of its own: a client's budget holds all of them."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dpfix

NOISE, BATCH, PEOPLE, DELTA = 2.0, 20, 100, 1e-3
Weights = list[np.ndarray[Any, Any]]


def round_of(client: int, folder: str, weights: Weights) -> tuple[Weights, int, float]:
    """What a client does in a process that remembers nothing: weights, steps, and what it has spent."""
    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(client)
    x = torch.randn(PEOPLE, 6, generator=draw)
    model = nn.Linear(6, 2)
    with torch.no_grad():
        for p, value in zip(model.parameters(), weights, strict=True):
            p.copy_(torch.as_tensor(value))
    budget = dpfix.Budget(Path(folder) / f"{client}.json")
    model, optimizer, loader = dpfix.make_private_safe(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.5), criterion=nn.CrossEntropyLoss(),
        data_loader=DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=BATCH),
        noise_multiplier=NOISE, max_grad_norm=1.0, budget=budget,
    )  # fmt: skip
    steps = 0
    for features, labels in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(features), labels).backward()
        optimizer.step()
        steps += 1
    given = [p.detach().numpy() for p in model.to_standard_module().parameters()]
    return given, steps, budget.spent()


def test_a_clients_rounds_add_up_and_end_when_its_budget_is_spent(tmp_path: Path) -> None:
    for client, epsilon in enumerate((50.0, 1.0)):
        dpfix.Budget(tmp_path / f"{client}.json", epsilon=epsilon, delta=DELTA, accountant="rdp")
    weights: Weights = [np.zeros((2, 6), np.float32), np.zeros(2, np.float32)]
    answers, made, spent = [], [0, 0], [0.0, 0.0]
    refused = 0
    for _ in range(3):
        answers = []
        for client in range(2):
            with multiprocessing.get_context("fork").Pool(1) as fresh:
                try:
                    given, steps, spent[client] = fresh.apply(round_of, (client, str(tmp_path), weights))
                except dpfix.BudgetError:
                    refused += 1
                    continue
            answers.append(given)
            made[client] += steps
        weights = [np.mean([given[k] for given in answers], axis=0) for k in range(2)]
    assert made[0] == 3 * PEOPLE // BATCH
    assert spent[0] == pytest.approx(epsilon_of(made[0]))
    assert refused  # the second client has spent its budget before the first
    assert dpfix.Budget(tmp_path / "1.json").spent() <= 1.0


def epsilon_of(steps: int) -> float:
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = [(NOISE, BATCH / PEOPLE, steps)]
    return accountant.get_epsilon(DELTA)

"""What a collate function may do with the items of persons: change each by chance, but not move one to another's place."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, default_collate

import dpfix
from tests.helpers import points, sgd

ITEMS = 40
OWNERS = {"equal": [i % 8 for i in range(ITEMS)], "unequal": [i % 8 if i < 24 else i % 3 for i in range(ITEMS)]}
every_number = pytest.mark.parametrize("owners", OWNERS)
KEPT = np.random.default_rng(3)
KEPT_TOO = random.Random(4)


def run(collate: Callable[[list[Any]], Any], owners: str, told: bool = True, passes: int = 6, batch: int = 8) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    training = dpfix.make_private_safe(
        module=model, optimizer=sgd(model, 0.05), noise_multiplier=1.0, max_grad_norm=1.0, privacy_unit=OWNERS[owners],
        data_loader=DataLoader(points(ITEMS), batch_size=batch, collate_fn=collate), cache=False, strict=True,
        **({"criterion": nn.CrossEntropyLoss()} if told else {}),
    )  # fmt: skip
    for _ in range(passes):
        for x, y in training[2]:
            training[1].zero_grad()
            F.cross_entropy(training[0](x), y).backward()
            training[1].step()
    return training


def noisy(items: list[Any]) -> Any:
    x, y = default_collate(items)
    return x + 0.1 * torch.randn_like(x), y


def noisy_by_numpy(items: list[Any]) -> Any:
    x, y = default_collate(items)
    return x + torch.from_numpy(0.1 * np.random.randn(*x.shape)).float(), y


def noisy_by_its_own(items: list[Any]) -> Any:
    x, y = default_collate(items)
    return x + torch.from_numpy(0.1 * KEPT.standard_normal(x.shape)).float(), y


def turned(items: list[Any]) -> Any:
    return default_collate([(-x if random.random() < 0.5 else x, y) for x, y in items])


def turned_by_its_own(items: list[Any]) -> Any:
    return default_collate([(-x if KEPT_TOO.random() < 0.5 else x, y) for x, y in items])


def with_other_labels(items: list[Any]) -> Any:
    x, y = default_collate(items)
    return x, torch.where(torch.rand(len(y)) < 0.2, torch.randint(0, 3, y.shape), y)


def masked(items: list[Any]) -> Any:
    x, y = default_collate(items)
    return x * (torch.rand_like(x) > 0.3), y


@every_number
@pytest.mark.parametrize("told", [True, False], ids=["criterion", "nothing told"])
@pytest.mark.parametrize(
    "collate", [noisy, noisy_by_numpy, noisy_by_its_own, turned, turned_by_its_own, with_other_labels, masked]
)
def test_items_may_be_changed_by_chance(
    collate: Any, told: bool, owners: str, recwarn: pytest.WarningsRecorder
) -> None:
    training = run(collate, owners, told)
    assert training.statement(1e-3).samples == 8
    assert not [w for w in recwarn if issubclass(w.category, dpfix.DPFixWarning)]


def by_first(items: list[Any]) -> list[Any]:
    return sorted(items, key=lambda item: float(item[0][0]))


def noisy_and_sorted(items: list[Any]) -> Any:
    return noisy(by_first(items))


def noisy_and_shuffled(items: list[Any]) -> Any:
    x, y = noisy(items)
    order = torch.randperm(len(x))
    return x[order], y[order]


def some_turned_and_sorted(items: list[Any]) -> Any:
    x, y = default_collate(by_first(items))
    return torch.where((torch.rand(len(x)) < 0.5)[:, None], -x, x), y


def scaled_and_sorted(items: list[Any]) -> Any:
    x, y = default_collate(by_first(items))
    return x * (1 + torch.rand(1)), y


def sorted_if_many(items: list[Any]) -> Any:
    return default_collate(by_first(items) if len(items) > 20 else items)


@every_number
@pytest.mark.parametrize(
    "collate", [noisy_and_sorted, noisy_and_shuffled, some_turned_and_sorted, scaled_and_sorted, sorted_if_many]
)
def test_an_order_of_its_own_is_seen_behind_chance_and_in_large_batches(collate: Any, owners: str) -> None:
    with pytest.raises(dpfix.CoupledModelError, match=f"DPF049.*{collate.__name__}"):
        run(collate, owners)


def mixed_up(items: list[Any]) -> Any:
    x, y = noisy(items)
    return torch.where((torch.rand(len(x)) < 0.3)[:, None], x[torch.randperm(len(x))], x), y


def centred(items: list[Any]) -> Any:
    x, y = noisy(items)
    return x - x.mean(0), y


@every_number
@pytest.mark.parametrize("collate", [mixed_up, centred])
def test_mixing_is_seen_behind_chance(collate: Any, owners: str) -> None:
    with pytest.raises(dpfix.CoupledModelError, match=r"DPF04[69]"):
        run(collate, owners)


def rare_one_last(items: list[Any]) -> Any:
    return default_collate(sorted(items, key=lambda item: bool(item[0][0] > 100)))


def test_an_order_that_one_item_alone_shows_is_seen() -> None:
    """All persons of a batch are looked at, up to 32: one item that is put elsewhere moves those behind it."""
    torch.manual_seed(0)
    x, owners = torch.randn(60, 6), [i % 20 for i in range(60)]
    x[7] = 200.0
    model = nn.Linear(6, 3)
    private, optimizer, loader = dpfix.make_private_safe(
        module=model, optimizer=sgd(model, 0.0), noise_multiplier=1.0, max_grad_norm=1.0, cache=False, privacy_unit=owners,
        criterion=nn.CrossEntropyLoss(),
        data_loader=DataLoader(TensorDataset(x, torch.arange(60) % 3), batch_size=20, collate_fn=rare_one_last),
    )  # fmt: skip
    with pytest.raises(dpfix.CoupledModelError, match=r"DPF049.*rare_one_last"):
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(private(images), labels).backward()
            optimizer.step()

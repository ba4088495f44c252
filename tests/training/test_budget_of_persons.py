"""A budget adds up what was released about the same persons only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader, Subset

import dpfix
from tests.helpers import points, setting, train

DATA = points()


def begin(path: Path, whose: Any, indices: range | None = None, **changes: Any) -> dpfix.PrivateTraining:
    data = DATA if indices is None else Subset(DATA, list(indices))
    budget = dpfix.Budget(path, epsilon=50.0, delta=1e-3, **changes)
    return dpfix.make_private_safe(**setting(data_loader=DataLoader(data, 2), privacy_unit=whose, budget=budget))


def in_groups_of(size: int) -> list[str]:
    return [f"person {i // size}" for i in range(len(DATA))]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (in_groups_of(2), in_groups_of(4)),
        (in_groups_of(4), in_groups_of(2)),
        (in_groups_of(4), in_groups_of(1)),
        (in_groups_of(1), in_groups_of(4)),
        (in_groups_of(2), [i % 12 for i in range(24)]),
        ([i // 2 for i in range(24)], [i // 4 for i in range(24)]),
    ],
)
def test_other_persons_are_refused(tmp_path: Path, before: Any, after: Any) -> None:
    train(begin(tmp_path / "budget.json", before), 1)
    spent = dpfix.Budget(tmp_path / "budget.json").spent()
    with pytest.raises(dpfix.BudgetError, match="is the budget of other persons"):
        train(begin(tmp_path / "budget.json", after), 1)
    assert dpfix.Budget(tmp_path / "budget.json").spent() == spent


def test_the_same_persons_add_up(tmp_path: Path) -> None:
    train(begin(tmp_path / "budget.json", in_groups_of(4)), 1)
    spent = dpfix.Budget(tmp_path / "budget.json").spent()
    renamed = [f"{name}, again" for name in in_groups_of(4)]  # who has which items is the same
    train(begin(tmp_path / "budget.json", renamed), 1)
    assert dpfix.Budget(tmp_path / "budget.json").spent() > spent
    assert "; persons" not in str(dpfix.Budget(tmp_path / "budget.json"))


def test_folds_add_up(tmp_path: Path) -> None:
    for fold in (range(12), range(12, 24), None):
        size = 24 if fold is None else 12
        train(begin(tmp_path / "budget.json", in_groups_of(4)[:size], fold), 1)
    with pytest.raises(dpfix.BudgetError, match="is the budget of other persons"):
        train(begin(tmp_path / "budget.json", in_groups_of(2)), 1)


def test_parts_add_up(tmp_path: Path) -> None:
    for size in (2, 4):  # of different data sets, which are parts of one
        train(begin(tmp_path / "budget.json", in_groups_of(size), samples=100), 1)

"""Which loaders draw from the same people."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    StackDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
)

from dpfix.sampling.population import Population
from tests.helpers import points

DATA = points()


class Augmented(Dataset[Any]):
    """The samples of a data set, never twice the same, with their labels."""

    def __init__(self, of: TensorDataset) -> None:
        self.of = of

    def __len__(self) -> int:
        return len(self.of)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = self.of[index]
        return x + torch.randn(6), y


class Broken(Augmented):
    def __getitem__(self, index: int) -> Any:
        raise RuntimeError("not now")


def sampled(indices: range) -> DataLoader[Any]:
    return DataLoader(DATA, 4, sampler=SubsetRandomSampler(indices))


def part(first: int, last: int) -> Subset[Any]:
    return Subset(DATA, range(first, last))


OTHER = TensorDataset(DATA.tensors[0] + 1, DATA.tensors[1])
SAME = [
    (lambda: DATA, lambda: DATA),
    (lambda: DATA, points),  # made again
    (lambda: part(0, 12), lambda: part(11, 24)),
    (lambda: Subset(DATA, [-1, 0]), lambda: part(23, 24)),
    (lambda: ConcatDataset([OTHER, part(0, 4)]), lambda: part(3, 5)),
    (lambda: StackDataset(DATA, OTHER), lambda: OTHER),
    (lambda: Subset(part(12, 24), [0]), lambda: part(0, 13)),
    (lambda: Augmented(DATA), lambda: Augmented(DATA)),
    (lambda: Broken(DATA), lambda: Broken(OTHER)),
    (lambda: list(range(5)), lambda: list(range(5))),
]
DIFFERENT = [
    (lambda: DATA, lambda: OTHER),
    (lambda: DATA, lambda: points(23)),
    (lambda: part(0, 12), lambda: part(12, 24)),
    (lambda: ConcatDataset([OTHER, part(0, 4)]), lambda: part(4, 8)),
    (lambda: list(range(5)), lambda: list(range(6))),
]


@pytest.mark.parametrize(("pair", "same"), [(p, True) for p in SAME] + [(p, False) for p in DIFFERENT])
def test_the_same_people(pair: tuple[Callable[[], Any], Callable[[], Any]], same: bool) -> None:
    one, other = (make() for make in pair)
    populations = [Population(DataLoader(data, 4)) for data in (one, other)]
    assert populations[0].overlaps(populations[1]) is populations[1].overlaps(populations[0]) is same


def test_a_sampler_decides_who_is_drawn() -> None:
    first, second = Population(sampled(range(12))), Population(sampled(range(12, 24)))
    assert not first.overlaps(second) and first.overlaps(Population(DataLoader(DATA, 4)))


def test_data_that_is_gone_is_the_same_if_it_looked_the_same() -> None:
    gone = Population(DataLoader(points(), 4))
    assert gone.overlaps(Population(DataLoader(OTHER, 4)))
    assert not gone.overlaps(Population(DataLoader(points(20), 4)))


def test_a_comparison_leaves_the_generators_alone() -> None:
    one, other = Augmented(DATA), Augmented(OTHER)
    before = torch.get_rng_state()
    Population(DataLoader(one, 4)).overlaps(Population(DataLoader(other, 4)))
    assert torch.equal(before, torch.get_rng_state())

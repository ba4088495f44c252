"""An index set that names one record several times is refused: a release would hold that record as often."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, StackDataset, Subset, SubsetRandomSampler
from typing_extensions import override

import dpfix
from dpfix.sampling.records import repeated
from tests.helpers import points, setting

DATA = points(24)
IMAGES, LABELS = [torch.ones(6) * i for i in range(12)], [i % 3 for i in range(12)]


class Letters(Dataset[Any]):
    """A data set with keys that are no numbers."""

    @override
    def __getitem__(self, index: str) -> Any:
        return torch.full((6,), float(ord(index))), 0


class Lazy(Subset[Any]):
    """Finds its items in its own way, without a list of indices."""

    @override
    def __init__(self) -> None:
        self.dataset = DATA

    @override
    def __getitem__(self, index: Any) -> Any:
        return DATA[index]

    @override
    def __getitems__(self, indices: Any) -> Any:
        return [DATA[index] for index in indices]

    @override
    def __len__(self) -> int:
        return 12


REPEATED: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "Subset": (lambda: Subset(DATA, [0, 0, 0, 0, *range(1, 12)]), {}),
    "tensor of indices": (lambda: Subset(DATA, torch.tensor([3, 3, 4, 5])), {}),  # type: ignore[arg-type]
    "nested Subset": (lambda: Subset(Subset(DATA, [5, 5, 6, 7, 8, 9]), range(5)), {}),
    "Subset of a Subset": (lambda: Subset(Subset(DATA, [5, 6, 7, 8, 9]), [0, 1, 2, 1, 3]), {}),
    "from the end": (lambda: Subset(DATA, [23, 1, 2, -1]), {}),
    "keys": (lambda: Subset(Letters(), ["a", "b", "c", "a"]), {}),  # type: ignore[list-item]
    "ConcatDataset": (lambda: ConcatDataset([DATA, DATA]), {}),
    "ConcatDataset of overlapping Subsets": (
        lambda: ConcatDataset([Subset(DATA, range(10)), Subset(DATA, [20, 9, 21])]),
        {},
    ),
    "StackDataset": (lambda: StackDataset(Subset(IMAGES, [1, 1, 2, 3]), Subset(LABELS, [1, 1, 2, 3])), {}),  # type: ignore[arg-type]
    "sampler": (lambda: DATA, {"sampler": SubsetRandomSampler([2, 2, 2, *range(12)])}),
    "sampler from the end": (lambda: DATA, {"sampler": SubsetRandomSampler([23, -1, 22, 0, 1])}),
    "sampler over a Subset": (lambda: Subset(DATA, [4, 4, 5, 6]), {"sampler": SubsetRandomSampler([0, 1, 2])}),
}
ONCE: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "parts": (lambda: ConcatDataset([Subset(DATA, range(12)), Subset(DATA, range(12, 24))]), {}),
    "other data": (lambda: ConcatDataset([points(12), points(12)]), {}),
    "keys": (lambda: Subset(Letters(), ["a", "b", "c", "d"]), {}),  # type: ignore[list-item]
    "lists as keys": (lambda: Subset(Letters(), [["a"], ["b"]]), {}),  # type: ignore[list-item]
    "a Subset without indices": (Lazy, {}),
    "repeated indices that are not drawn": (
        lambda: Subset(DATA, [4, 4, 5, 6]),
        {"sampler": SubsetRandomSampler([1, 2, 3])},
    ),
    "records that share a label": (lambda: StackDataset(IMAGES[:4], Subset(LABELS, [0, 0, 1, 1])), {}),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("poisson", [True, False], ids=["Poisson", "own order"])
@pytest.mark.parametrize("name", REPEATED)
def test_a_record_under_several_indices_is_refused(name: str, poisson: bool) -> None:
    """Without Poisson sampling too: what is wrong is the share of a record in one release."""
    dataset, options = REPEATED[name]
    loader = DataLoader(dataset(), batch_size=2, **options)
    with pytest.raises(dpfix.LoaderError, match=r"several times[\s\S]*clip norms[\s\S]*weight the loss") as refusal:
        dpfix.make_private_safe(**setting(data_loader=loader, poisson_sampling=poisson))
    assert [(f.code, f.path) for f in refusal.value.findings] == [("DPF011", "data_loader")]


@pytest.mark.parametrize("name", ONCE)
def test_records_that_are_named_once_are_none_of_them(name: str) -> None:
    dataset, options = ONCE[name]
    assert repeated(DataLoader(dataset(), batch_size=2, **options)) is None


def test_the_record_that_is_repeated_most_is_named() -> None:
    found = repeated(DataLoader(Subset(DATA, [8, 3, 3, 8, 5, 3]), batch_size=2))
    assert found is not None and (found.records, found.times, found.indices) == (2, 3, [1, 2, 5])

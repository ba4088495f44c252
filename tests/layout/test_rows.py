"""The rows of a tensor by the sample they belong to: every way to take them apart and put them together agrees."""

from __future__ import annotations

import pytest
import torch

from dpfix.errors import PlanBrokenError
from dpfix.layout.rows import Rows, rows_of
from dpfix.layout.sample_dim import SampleDim

SAMPLES = 3
LAYOUTS = {
    "one row": SampleDim(0),
    "several rows": SampleDim(0, 2),
    "views": SampleDim(0, 2, interleaved=True),
    "time first": SampleDim(1),
    "in the middle": SampleDim(1, 2, interleaved=True),
    "other numbers of rows": SampleDim(0, 2, counts=(1, 3, 2)),
    "other numbers of rows in the middle": SampleDim(1, counts=(2, 0, 1)),
}
every_layout = pytest.mark.parametrize("dim", LAYOUTS.values(), ids=LAYOUTS)


def made(dim: SampleDim) -> tuple[torch.Tensor, list[int]]:
    """A tensor whose values say the sample they belong to, and the rows of every sample."""
    counts = [n * dim.rows for n in dim.counts] or [dim.rows] * SAMPLES
    owners = [i for i, n in enumerate(counts) for _ in range(n)]
    if dim.interleaved:
        owners = list(range(SAMPLES)) * dim.rows
    shape = [4, 4, 4]
    shape[dim.dim] = len(owners)
    tensor = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(shape).movedim(dim.dim, 0).contiguous()
    tensor[:] = tensor / 1000 + torch.tensor(owners).view(-1, 1, 1)
    return tensor.movedim(0, dim.dim), counts


@every_layout
def test_taken_rows_are_the_samples_own_and_join_to_the_whole(dim: SampleDim) -> None:
    tensor, counts = made(dim)
    rows = rows_of(tensor, dim, SAMPLES)
    parts = [rows.take(tensor, i) for i in range(SAMPLES)]
    assert [p.shape[dim.dim] for p in parts] == counts
    assert all((p.floor() == i).all() for i, p in enumerate(parts))
    assert torch.equal(rows.join(parts), tensor)
    assert all(p.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr() for p in parts), "views"


@every_layout
def test_split_rows_merge_to_the_whole(dim: SampleDim) -> None:
    tensor, _ = made(dim)
    rows = Rows.of(dim, SAMPLES)
    split = rows.split(tensor)
    assert len(split) == SAMPLES and torch.equal(rows.merge(split), tensor)


@every_layout
def test_selected_samples_are_laid_out_like_the_tensor(dim: SampleDim) -> None:
    tensor, _ = made(dim)
    rows = Rows.of(dim, SAMPLES)
    order = [2, 0, 2, 1]
    if dim.counts:
        wanted = torch.cat([rows.take(tensor, i) for i in order], dim.dim)
    else:
        wanted = Rows.of(dim, len(order)).join([rows.take(tensor, i) for i in order])
    assert torch.equal(rows.select(tensor, order), wanted)


def test_numbers_of_own_rows_go_along_with_the_rows() -> None:
    edges = torch.tensor([
        [0, 2, 3, 4, 7, 8],
        [1, 1, 5, 3, 6, 8],
    ])  # two edges for each of three graphs with three nodes
    rows = Rows.of(SampleDim(1, 2), SAMPLES)
    assert rows.counts_rows(edges)
    assert rows.exchange(edges, (0, 0, 2)).tolist() == [[0, 2, 3, 5, 7, 8], [1, 1, 4, 4, 6, 8]]
    across = edges.clone()
    across[0, 0] = 3  # a node of another graph
    for other in (across, edges.double(), edges.flip(1), torch.zeros_like(edges)):
        assert not rows.counts_rows(other)
        assert torch.equal(rows.exchange(other, (0, 0, 2)), rows.select(other, (0, 0, 2)))
    assert not Rows(SAMPLES).counts_rows(torch.arange(SAMPLES))  # may be labels


def test_a_tensor_that_does_not_hold_the_samples_is_refused() -> None:
    for dim, size in ((SampleDim(0), 7), (SampleDim(0, 2), 7), (SampleDim(0, counts=(1, 2, 3)), 7), (SampleDim(3), 3)):
        with pytest.raises(PlanBrokenError, match="does not hold 3 samples"):
            rows_of(torch.zeros(size, 2), dim, SAMPLES)

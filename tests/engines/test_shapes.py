"""The book-keeping engine over shapes that nobody chose, and over the choice between its forms."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dpfix.engines.bookkeeping import convolution_costs
from dpfix.engines.bookkeeping.blocks import CACHE
from dpfix.engines.bookkeeping.contributions import Contribution
from dpfix.engines.bookkeeping.convolution_costs import Geometry, worth_trying
from dpfix.engines.bookkeeping.convolution_norms import Correlation
from dpfix.engines.bookkeeping.embedding import Lookup, Tied
from dpfix.engines.bookkeeping.linear import Outer
from dpfix.engines.bookkeeping.tied_parameters import add_up
from tests.engines.comparing import check, floats, ids

small = st.integers(1, 4)
FEW = settings(max_examples=25, deadline=None)


@FEW
@given(sizes=st.lists(small, min_size=0, max_size=3), wide=st.integers(1, 40), high=st.integers(1, 40))
def test_linear(sizes: list[int], wide: int, high: int) -> None:
    check(nn.Sequential(nn.Linear(wide, high), nn.Tanh(), nn.Linear(high, 2)), floats(*sizes, wide))


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    dims, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3]))
    kernel = tuple(draw(small) for _ in range(dims))
    transposed = draw(st.booleans())
    stride, dilation = (tuple(draw(st.integers(1, 3)) for _ in range(dims)) for _ in range(2))
    padding = tuple(draw(st.integers(0, max(0, d * (k - 1) // 2))) for d, k in zip(dilation, kernel, strict=True))
    size = tuple(d * (k - 1) + 1 + draw(st.integers(0, 6)) for d, k in zip(dilation, kernel, strict=True))
    kinds = (
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
        if transposed
        else (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    )
    layer = kinds[dims - 1](
        2 * groups, groups * draw(small), kernel, stride, padding, groups=groups, dilation=dilation,
        bias=draw(st.booleans()),
    )  # fmt: skip
    return layer, (2 * groups, *size)


@FEW
@given(convolutions())
def test_convolution(case: tuple[nn.Module, tuple[int, ...]]) -> None:
    layer, shape = case
    check(layer, floats(*shape))


@FEW
@given(words=st.integers(2, 9), positions=st.integers(1, 6), width=st.integers(1, 6))
def test_embedding(words: int, positions: int, width: int) -> None:
    check(nn.Sequential(nn.Embedding(words, width), nn.Linear(width, 3)), ids(words, positions))


def same(contribution: Contribution, wanted: torch.Tensor) -> None:
    """All three answers of a contribution, against per-sample gradients."""
    factors = torch.rand(len(wanted), dtype=torch.float64)
    assert torch.allclose(contribution.per_sample(), wanted, rtol=1e-10)
    assert torch.allclose(contribution.squared_norms(), wanted.flatten(1).square().sum(1), rtol=1e-9, atol=1e-12)
    assert torch.allclose(contribution.weighted_sum(factors), torch.einsum("i,i...", factors, wanted), rtol=1e-9)


@FEW
@given(positions=st.integers(1, 40), wide=st.integers(1, 60), high=st.integers(1, 60))
def test_products(positions: int, wide: int, high: int) -> None:
    a = torch.randn(3, positions, wide, dtype=torch.float64)
    g = torch.randn(3, positions, high, dtype=torch.float64)
    same(Outer(a, g, torch.Size((high, wide))), torch.einsum("bto,bti->boi", g, a))


@FEW
@given(words=st.integers(1, 9), positions=st.integers(1, 6), products=st.integers(1, 6))
def test_a_table_that_also_multiplies(words: int, positions: int, products: int) -> None:
    index = torch.randint(0, words, (3, positions))
    g, a = (torch.randn(3, n, 4, dtype=torch.float64) for n in (positions, products))
    logits = torch.randn(3, products, words, dtype=torch.float64)
    table = torch.einsum("btw,bti->bwi", nn.functional.one_hot(index, words).double(), g)
    tied = Tied(Lookup(index, g, words), Outer(a, logits, torch.Size((words, 4))))
    same(tied, table + torch.einsum("btw,bti->bwi", logits, a))


@pytest.mark.parametrize("large", [False, True], ids=["gram", "product"])
def test_both_ways_to_norms_of_convolutions(large: bool) -> None:
    size = 24 if large else 4
    x = torch.randn(2, 4, size, size, dtype=torch.float64)
    g = torch.randn(2, 6, size, size, dtype=torch.float64)
    form = Correlation(x, g, torch.Size((6, 4, 3, 3)), Geometry((1, 1), (1, 1), (1, 1), 1))
    weight = torch.zeros(6, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    one = [
        torch.autograd.grad(nn.functional.conv2d(a[None], weight, padding=1), weight, b[None])[0]
        for a, b in zip(x, g, strict=True)
    ]
    same(form, torch.stack(one))


CONVOLUTIONS = {
    "strided": ((7, 6), (3, 3), Geometry((2, 2), (1, 1), (1, 1), 1)),
    "dilated in one dimension": ((9, 8), (3, 2), Geometry((1, 3), (0, 2), (2, 1), 1)),
    "as large as its input": ((4, 3), (4, 3), Geometry((1, 1), (0, 0), (1, 1), 1)),
    "one by many": ((5, 6), (1, 4), Geometry((1, 1), (0, 1), (1, 1), 1)),
    "in one dimension": ((11,), (5,), Geometry((2,), (2,), (1,), 1)),
    "in three dimensions": ((4, 6, 5), (2, 5, 3), Geometry((2, 1, 1), (0, 2, 1), (1, 1, 2), 1)),
}


@pytest.fixture(params=["one block", "several blocks", "an accelerator's block"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In how many parts a layer is measured."""
    if request.param == "several blocks":
        monkeypatch.setitem(CACHE, "cpu", 1)
    elif request.param == "an accelerator's block":
        monkeypatch.delitem(CACHE, "cpu")


def convolved(kind: str, groups: int, filters: int, rows: int) -> tuple[Correlation, Tensor]:
    """A convolution of four channels on nine samples, and the gradients of its weight, from ordinary autograd."""
    torch.manual_seed(0)
    size, kernel, geometry = CONVOLUTIONS[kind]
    geometry = replace(geometry, groups=groups)
    conv: Any = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[len(size) - 1]
    how = (geometry.stride, geometry.padding, geometry.dilation, groups)
    weight = torch.zeros(filters, 4 // groups, *kernel, dtype=torch.float64, requires_grad=True)
    x = torch.randn(9 * rows, 4, *size, dtype=torch.float64)
    g = torch.randn_like(conv(x, weight, None, *how)).mT.contiguous().mT  # not in the order of its dimensions
    wanted = [
        torch.autograd.grad(conv(a, weight, None, *how), weight, b)[0]
        for a, b in zip(x.split(rows), g.split(rows), strict=True)
    ]
    return Correlation(x, g, weight.shape, geometry, rows), torch.stack(wanted)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_every_way_to_the_gradients_of_convolutions(kind: str, groups: int, rows: int) -> None:
    form, gradients = convolved(kind, groups, 6, rows)
    for keep in (form.keep_by_groups, form.keep_by_patches):
        torch.testing.assert_close(keep(), gradients)
    for norms in (form.norms_by_sample, form.norms_by_patches, form.norms_by_groups, form.norms_by_gram):
        torch.testing.assert_close(norms(), gradients.flatten(1).square().sum(1))
    same(form, gradients)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", [kind for kind, (size, *_) in CONVOLUTIONS.items() if len(size) == 2])
def test_depthwise_convolutions_by_lines(kind: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    form, gradients = convolved(kind, 4, 4, rows)
    torch.testing.assert_close(form.keep_by_lines(), gradients)
    monkeypatch.setattr(convolution_costs, "WORTH_TRYING", math.inf)
    ways = worth_trying.__wrapped__(form.x.shape[1:], form.g.shape[1:], form.shape, form.geometry, rows, 2**20)
    assert "keep_by_lines" in ways


@pytest.mark.parametrize("rows", [(1, 1), (2, 1, 3)])
def test_calls_of_a_convolution_are_one_with_the_rows_of_all(rows: tuple[int, ...]) -> None:
    """No gradient of a single sample is made, which for all samples may be much larger than what the calls kept."""
    torch.manual_seed(0)
    calls, wanted = [], torch.zeros(3, 128, 96, 3, 3, dtype=torch.float64)
    for of_call in rows:
        x = torch.randn(3 * of_call, 96, 2, 2, dtype=torch.float64)
        g = torch.randn(3 * of_call, 128, 2, 2, dtype=torch.float64)
        calls.append(Correlation(x, g, wanted.shape[1:], Geometry((1, 1), (1, 1), (1, 1), 1), of_call))
        wanted += calls[-1].per_sample()
    together = add_up(calls)
    assert isinstance(together, Correlation) and together.rows == sum(rows)
    same(together, wanted)


def test_calls_of_a_convolution_on_several_sizes_add_up() -> None:
    torch.manual_seed(0)
    geometry, shape = Geometry((1, 1), (1, 1), (1, 1), 1), torch.Size((6, 4, 3, 3))
    calls = [
        Correlation(*(torch.randn(3, n, size, size, dtype=torch.float64) for n in (4, 6)), shape, geometry)
        for size in (4, 5, 4)
    ]
    same(add_up(calls), torch.stack([c.per_sample() for c in calls]).sum(0))

"""Norms and clipped sums where the terms of a sample's gradient nearly cancel: inputs with a large common offset."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dpfix.engines.bookkeeping import Bookkeeping
from dpfix.engines.bookkeeping.cancellation import certain
from dpfix.engines.bookkeeping.contributions import Apart, Contribution, Kept, Part
from dpfix.engines.bookkeeping.convolution_costs import Geometry
from dpfix.engines.bookkeeping.convolution_norms import Correlation
from dpfix.engines.bookkeeping.embedding import Lookup
from dpfix.engines.bookkeeping.embedding import Tied as TiedUses
from dpfix.engines.bookkeeping.linear import Outer
from dpfix.observe.training_step import TrainingStep
from tests.engines.comparing import SAMPLES, plan_for, probe_of

OFFSETS = st.sampled_from([0.0, 1.0, 30.0, 1e3, 1e4, 1e6])
FEW = settings(max_examples=25, deadline=None)


def weighted(model: nn.Module, batch: Any) -> Tensor:
    """A loss whose gradient at the model's output is the batch's second entry, to the last digit."""
    return (model(batch[0]) * batch[1]).sum()


STEP = TrainingStep(weighted, "test", loss_known=True)


@dataclass
class Released:
    """What one step gives away."""

    norms: Tensor
    sums: dict[str, Tensor]


def cancelling(shape: torch.Size, dim: int, leftover: float) -> Tensor:
    """Output gradients that add up to (nearly) nothing along a dimension."""
    g = torch.randn(shape, dtype=torch.float64)
    return g - g.mean(dim, keepdim=True) + leftover * torch.randn(shape, dtype=torch.float64)


def released(model: nn.Module, batch: tuple[Tensor, Tensor], clip_norm: float) -> Released:
    probe = probe_of(lambda _: batch)
    plan, _ = plan_for(copy.deepcopy(model).double(), probe_of(lambda _: tuple(as_double(t) for t in batch)), STEP)
    handle = Bookkeeping().attach(model, dataclasses.replace(plan, loss_reduction="sum"))
    parameters = list(model.parameters())
    try:
        weighted(model, probe.batch).backward()
        norms = handle.clip_and_accumulate(parameters, clip_norm)
        assert norms is not None
        return Released(norms[:, 0], {n: p.summed_grad for n, p in model.named_parameters()})  # type: ignore[misc]
    finally:
        handle.detach()


def as_double(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t


def alone(model: nn.Module, batch: tuple[Tensor, Tensor], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Gradients of every sample by ordinary autograd, in double precision."""
    model, found = copy.deepcopy(model).to(dtype), []
    for i in range(SAMPLES):
        one = (t[i : i + 1] for t in batch)
        loss = weighted(model, tuple(t.to(dtype) if t.is_floating_point() else t for t in one))
        found.append(torch.autograd.grad(loss, list(model.parameters())))
    return {n: torch.stack([f[k] for f in found]).double() for k, (n, _) in enumerate(model.named_parameters())}


def norms_of(gradients: dict[str, Tensor]) -> Tensor:
    return torch.stack([g.flatten(1).square().sum(1) for g in gradients.values()]).sum(0).sqrt()


def check(model: nn.Module, batch: tuple[Tensor, Tensor], clip: float = 0.5, dtype: torch.dtype | None = None) -> None:
    """Norms to 1e-3 of them, and the sum to a small part of the clip norm, beside what one sample alone loses.

    Args:
        clip: the clip norm as a multiple of the samples' median norm.
        dtype: what one sample alone is computed in; the model's dtype.
    """
    wanted, rounded = alone(model, batch), alone(model, batch, dtype or batch[1].dtype)
    norms, lost = norms_of(wanted), norms_of({n: wanted[n] - rounded[n] for n in wanted})
    clip_norm = max(float(clip * norms.median()), 1e-12)
    found = released(model, batch, clip_norm)
    rounding = 8 * lost.max() + 1e-9  # what one sample loses is chance
    assert ((found.norms.double() - norms).abs() <= 1e-3 * norms + rounding).all(), (found.norms, norms, lost)
    factors = (clip_norm / (norms + 1e-6)).clamp(max=1)
    for name, g in wanted.items():
        total = torch.einsum("i,i...", factors, g)
        error, digits = (found.sums[name].double() - total).norm(), torch.finfo(found.sums[name].dtype).eps
        allowed = 2e-3 * clip_norm * SAMPLES + 16 * (factors * lost).sum() + digits * total.norm()
        assert error <= allowed, f"{name}: {float(error) / clip_norm:.1e} clip norms"


@FEW
@given(
    positions=st.integers(2, 40), wide=st.integers(1, 60), high=st.integers(1, 60), offset=OFFSETS,
    leftover=st.sampled_from([0.0, 1e-3, 1.0]), clip=st.sampled_from([0.1, 2.0]),
)  # fmt: skip
def test_linear(positions: int, wide: int, high: int, offset: float, leftover: float, clip: float) -> None:
    x = offset + torch.randn(SAMPLES, positions, wide)
    g = cancelling(torch.Size((SAMPLES, positions, high)), 1, leftover).float()
    check(nn.Linear(wide, high, bias=False), (x, g), clip)


@FEW
@given(
    dims=st.integers(1, 3), groups=st.sampled_from([1, 2]), kernel=st.integers(1, 3), size=st.integers(3, 6),
    transposed=st.booleans(), offset=OFFSETS,
)  # fmt: skip
def test_convolutions(dims: int, groups: int, kernel: int, size: int, transposed: bool, offset: float) -> None:
    kinds = (
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
        if transposed
        else (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    )
    layer: Any = kinds[dims - 1](2 * groups, 16 * groups, kernel, groups=groups, bias=False)
    x = offset + torch.randn(SAMPLES, 2 * groups, *[size] * dims)
    shape = layer(x).shape
    g = cancelling(torch.Size((*shape[:2], shape[2:].numel())), 2, 0.0).view(shape)
    check(layer, (x, g.float()))


@FEW
@given(words=st.integers(1, 5), positions=st.integers(2, 20), offset=OFFSETS)
def test_tables(words: int, positions: int, offset: float) -> None:
    """Here the output gradients have the offset; what a token gets from one place it loses at another."""
    tokens = torch.randint(0, words, (SAMPLES, positions))
    half = offset * torch.randn(SAMPLES, positions, 6) + torch.randn(SAMPLES, positions, 6) * (offset == 0)
    small = 1e-2 * torch.randn(SAMPLES, positions, 6)
    check(nn.Embedding(words, 6), (torch.cat([tokens, tokens], 1), torch.cat([half, small - half], 1)))


@FEW
@given(positions=st.integers(2, 8), offset=OFFSETS)
def test_a_table_that_also_multiplies(positions: int, offset: float) -> None:
    """Both uses nearly cancel: ``table[id] . table[other]`` with output gradients that add up to nothing."""
    tokens = torch.randint(0, 9, (SAMPLES, positions))
    g = cancelling(torch.Size((SAMPLES, positions, 9)), 1, 1e-3)
    check(Tied(1 + offset), (tokens, g.float()))


class Tied(nn.Module):
    """A language model without anything between its table and its head."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 32)
        self.table.weight.data += size

    def forward(self, tokens: Tensor) -> Tensor:
        return nn.functional.linear(self.table(tokens), self.table.weight)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "attention": lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True),
    "LSTM": lambda: First(nn.LSTM(8, 6, batch_first=True)),
    "GRU": lambda: First(nn.GRU(8, 6, batch_first=True)),
    "two linear": lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)),
    "centred": lambda: nn.Sequential(nn.Linear(8, 30), Centred(), nn.Tanh(), nn.Linear(30, 3)),
}


class First(nn.Module):
    """The first output of a layer."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]


class Centred(nn.Module):
    """Takes off the mean over all tokens, so that an offset of the input cancels."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(1, keepdim=True)


@pytest.mark.parametrize("name", LAYERS)
@settings(max_examples=12, deadline=None)
@given(
    positions=st.integers(2, 20), offset=st.sampled_from([0.0, 1.0, 30.0, 1e3, 1e4]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_layers_of_several(name: str, positions: int, offset: float, dtype: torch.dtype) -> None:
    model = LAYERS[name]().to(dtype)
    x = (offset + torch.randn(SAMPLES, positions, 8)).to(dtype)
    check(model, (x, cancelling(model(x).shape, 1, 0.0).to(dtype)))


FORMS: dict[str, Callable[[], Contribution]] = {
    "linear, few positions": lambda: Outer(offset(3, 8, 64), balanced(3, 8, 64), torch.Size((64, 64))),
    "linear, many positions": lambda: Outer(offset(3, 400, 8), balanced(3, 400, 8), torch.Size((8, 8))),
    "convolution": lambda: Correlation(offset(3, 4, 40), filters(3, 6, 40), torch.Size((6, 4, 1)), PLAIN),
    "table": lambda: Lookup(torch.zeros(3, 400, dtype=torch.long), 1e6 * balanced(3, 400, 8), 2),
    "table and product": lambda: TiedUses(
        Lookup(torch.zeros(3, 40, dtype=torch.long), 1e6 * balanced(3, 40, 8), 2),
        Outer(offset(3, 40, 8), balanced(3, 40, 2), torch.Size((2, 8))),
    ),
    "parts": lambda: Apart([
        Part(FORMS[n](), r, r + 8, torch.Size((80, 8))) for n, r in (("linear, many positions", 9),)
    ]),
}
PLAIN = Geometry((1,), (0,), (1,), 1)


def offset(*shape: int) -> Tensor:
    return 1e6 + torch.randn(shape)


def balanced(samples: int, positions: int, features: int) -> Tensor:
    return cancelling(torch.Size((samples, positions, features)), 1, 0.0).float()


def filters(samples: int, features: int, positions: int) -> Tensor:
    return balanced(samples, positions, features).mT.contiguous()


@pytest.mark.parametrize("name", FORMS)
def test_what_is_released_is_what_was_clipped(name: str) -> None:
    """To the last digits that matter: not what one sample alone would lose in single precision."""
    torch.manual_seed(0)
    form = FORMS[name]()
    exact = form.picked(torch.arange(3), True).per_sample()
    assert exact.dtype == torch.float64
    p, wanted = nn.Parameter(torch.zeros(exact.shape[1:])), exact.flatten(1).square().sum(1)
    clip_norm = 0.5 * float(wanted.median().sqrt())
    parts, squared = certain({p: form}, clip_norm, 1.0)
    torch.testing.assert_close(squared.double(), wanted, rtol=1e-3, atol=0)
    factors = (clip_norm / wanted.sqrt()).clamp(max=1)
    error = parts[p].weighted_sum(factors.float()).double() - torch.einsum("i,i...", factors, exact)
    assert float(error.norm()) <= 1e-3 * clip_norm
    plain = form.weighted_sum(factors.float()).double() - torch.einsum("i,i...", factors, exact)
    assert float(plain.norm()) > 2e-3 * clip_norm, "the case is too easy"


def by_gram(groups: int) -> Correlation:
    """A convolution whose norms come from Gram matrices."""
    x, g = 1e4 + torch.randn(3, 4, 40), filters(3, 6, 40)
    form = Correlation(x, g, torch.Size((6, 4 // groups, 1)), Geometry((1,), (0,), (1,), groups))
    form.way = "norms_by_gram"
    return form


GRAM: dict[str, Callable[[], Contribution]] = {
    "linear": lambda: Outer(1e4 + torch.randn(3, 8, 64), balanced(3, 8, 64), torch.Size((64, 64))),
    "convolution": lambda: by_gram(1),
    "groups": lambda: by_gram(2),
    "table and product": lambda: TiedUses(
        Lookup(torch.zeros(3, 40, dtype=torch.long), 1e4 * balanced(3, 40, 8), 2),
        Outer(1e4 + torch.randn(3, 40, 8), balanced(3, 40, 2), torch.Size((2, 8))),
    ),
}


@pytest.mark.parametrize("name", GRAM)
@pytest.mark.parametrize("share", [1.0, 1e-3], ids=["alone", "beside larger gradients"])
def test_norms_from_products(name: str, share: float) -> None:
    """A norm counts by what it adds to the whole one."""
    form = GRAM[name]()
    exact = form.picked(torch.arange(3), True).per_sample().flatten(1)
    wanted = exact.square().sum(1)
    rest = (wanted * (1 - share) / share).sqrt().float()
    p, q = nn.Parameter(torch.zeros(exact.shape[1:])), nn.Parameter(torch.zeros(1))
    clip_norm = float((wanted / share).sqrt().min())
    _, squared = certain({p: form, q: Kept(rest[:, None])}, clip_norm, 1.0)
    torch.testing.assert_close(squared.double(), wanted / share, rtol=1e-3, atol=0)
    off = float((form.squared_norms().double() - wanted).abs().max() / wanted.max())
    assert off > 1e-2, "the case is too easy"


@pytest.mark.parametrize("size", [4, 24], ids=["gram", "product"])
def test_half_precision(size: int) -> None:
    x, g = 256 + torch.randn(SAMPLES, size, 8), cancelling(torch.Size((SAMPLES, size, 16)), 1, 0.0)
    x, g = x.bfloat16(), g.bfloat16()
    check(nn.Linear(8, 16, bias=False).bfloat16(), (x, g), dtype=torch.float32)


def test_what_overflows_in_the_square_is_clipped_like_anything_else() -> None:
    x, g = 1e15 * torch.ones(SAMPLES, 6, 40), cancelling(torch.Size((SAMPLES, 6, 40)), 1, 1e-3)
    check(nn.Linear(40, 40, bias=False), (x, 1e6 * g.float()))


def test_an_ordinary_step_computes_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    again: list[Any] = []
    for kind in (Outer, Correlation):
        monkeypatch.setattr(kind, "picked", lambda self, *_: again.append(self))
    batch = torch.randn(SAMPLES, 6, 40), torch.randn(SAMPLES, 6, 40)
    released(nn.Linear(40, 40), batch, 1.0)
    assert not again


def test_only_the_samples_that_cancel_are_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    again: list[list[int]] = []
    picked = Outer.picked

    def spy(self: Outer, samples: Tensor, double: bool) -> Any:
        again.append(samples.tolist())
        return picked(self, samples, double)

    monkeypatch.setattr(Outer, "picked", spy)
    x, g = torch.randn(SAMPLES, 6, 40), torch.randn(SAMPLES, 6, 40)
    x[2] += 1e4
    g[2] -= g[2].mean(0)
    check(nn.Linear(40, 40, bias=False), (x, g))
    assert again
    assert all(samples == [2] for samples in again)

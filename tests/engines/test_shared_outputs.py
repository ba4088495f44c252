"""Layers that compute something for all samples at once, which the model turns into another shape: relative positions."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpfix.engines.bookkeeping import Bookkeeping
from dpfix.engines.bookkeeping.own_parameters import OwnParametersForward
from dpfix.engines.bookkeeping.unknown_module import UnknownModuleForward
from tests.engines.comparing import check, floats, plan_for, probe_of
from tests.helpers import one_step

T, HEADS, D = 6, 2, 8


def distances() -> Tensor:
    place = torch.arange(T)
    return place[:, None] - place[None, :] + T - 1


class Buckets(nn.Module):
    """A bias for every distance, looked up for every pair of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(2 * T - 1, HEADS)

    def forward(self) -> Tensor:
        return self.table(distances()).permute([2, 0, 1]).unsqueeze(0)


class Table(nn.Module):
    """The same as a parameter that is indexed by a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(2 * T - 1, HEADS))
        self.register_buffer("index", distances())

    def forward(self) -> Tensor:
        index: Any = self.index
        return self.table[index.view(-1)].view(T, T, -1).permute(2, 0, 1).contiguous().unsqueeze(0)


@cache
def cached() -> Tensor:
    return distances().flatten()


class Cached(nn.Module):
    """The same with an index that a cache of the code keeps between steps."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(2 * T - 1, HEADS))

    def forward(self) -> Tensor:
        return torch.cat([self.table, self.table])[cached()].view(T, T, -1).permute(2, 0, 1)[None]


class Computed(nn.Module):
    """The same, computed by a network from the distances."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 5), nn.ReLU(), nn.Linear(5, HEADS, bias=False))

    def forward(self) -> Tensor:
        far = torch.arange(2 * T - 1).to(self.net[0].weight.dtype)[None, :, None] / T  # type: ignore[union-attr]
        return self.net(far).view(-1, HEADS)[distances().view(-1)].view(T, T, -1).permute(2, 0, 1).unsqueeze(0)


class Block(nn.Module):
    """Attention with a bias."""

    def __init__(self, eager: bool = False) -> None:
        super().__init__()
        self.qkv, self.out, self.eager = nn.Linear(D, 3 * D), nn.Linear(D, D), eager

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        if self.eager:
            scores = q @ k.mT
            scores += bias
            out = scores.softmax(-1) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return x + self.out(out.transpose(1, 2).flatten(2))


class Encoder(nn.Module):
    """Blocks that share the bias which the first one made."""

    def __init__(self, bias: Callable[[], nn.Module], eager: bool = False, windows: int = 1) -> None:
        super().__init__()
        self.bias, self.windows = bias(), windows
        self.blocks = nn.ModuleList([Block(eager) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        h, bias = x.reshape(-1, T, D), self.bias()
        for block in self.blocks:
            h = block(h, bias)
        return h.reshape(x.shape)


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("windows", [1, 3])
@pytest.mark.parametrize("bias", [Buckets, Table, Cached, Computed])
def test_a_bias_for_all_samples_is_exact_on_the_whole_batch(bias: type[nn.Module], windows: int, eager: bool) -> None:
    shape = (T, D) if windows == 1 else (windows * T, D)
    model = nn.Sequential(nn.Linear(D, D), Encoder(bias, eager, windows), nn.Linear(D, 3))
    check(model, floats(*shape))
    plan, _ = plan_for(model, probe_of(floats(*shape)))
    handle = Bookkeeping().attach(model, plan)
    try:
        assert any(isinstance(r, OwnParametersForward) for r in handle._replaced)
        assert not any(isinstance(r, UnknownModuleForward) for r in handle._replaced)
    finally:
        handle.detach()


class Positions(nn.Module):
    """A table of positions that is added as it is: its per-sample gradient is never made."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(T, D), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x + self.table(torch.arange(T)))


def test_positions_that_are_added_stay_a_lookup() -> None:
    model = Positions()
    check(model, floats(T, D))
    plan, _ = plan_for(model, probe_of(floats(T, D)))
    handle = Bookkeeping().attach(model, plan)
    try:
        assert {type(r).__name__ for r in handle._replaced} == {"LayerForward", "RootForward"}
    finally:
        handle.detach()


@pytest.mark.parametrize("engine", ["vmap", "bookkeeping", "microbatch"])
def test_every_engine_learns_the_mask_of_attention(engine: str) -> None:
    model = nn.Sequential(nn.Linear(D, D), Encoder(Table), nn.Flatten(), nn.Linear(T * D, 3))
    error, training = one_step(model, torch.randn(8, T, D), torch.arange(8) % 3, grad_sample_mode=engine)
    assert training.plan.engine == engine
    assert error < 1e-4


class Prompted(nn.Module):
    """Vectors in front of each sample, looked up by numbers that the model holds in a dictionary, and repeated."""

    def __init__(self, encoded: bool) -> None:
        super().__init__()
        self.numbers = {"default": torch.arange(3)}
        self.prompt = nn.Embedding(3, D)
        self.encoder = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D)) if encoded else nn.Identity()
        self.block, self.out = Block(), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        numbers = self.numbers["default"].unsqueeze(0).expand(1, -1)[0]
        prompt = self.encoder(self.prompt(numbers)).repeat(len(x), 1, 1)
        return self.out(self.block(torch.cat([prompt, x], 1), x.new_zeros(1, 1)).mean(1))


@pytest.mark.parametrize("encoded", [False, True])
def test_a_prompt_that_is_repeated_is_exact_on_the_whole_batch(encoded: bool) -> None:
    torch.manual_seed(0)
    data = torch.randn(8, T, D), torch.arange(8) % 3
    error, training = one_step(Prompted(encoded), *data, grad_sample_mode="bookkeeping")
    assert error < 1e-4
    assert training.plan.engine == "bookkeeping"

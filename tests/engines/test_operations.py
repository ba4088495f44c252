"""How many operations a step dispatches: the same for any number of samples, and a few times those of an ordinary step.

On a GPU a step of small operations takes as long as they are many. Counted are forward, backward, clipping and the clipped
sum. Convolutions are measured in blocks that fit into a processor's cache, at most four: they are counted as they are on a
processor, where that is all that may be added, and as they are on any other device. Not among the models: tables that a model
makes its weights from (relative positions), whose gradients go back sample by sample.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dpfix.engines.bookkeeping import Bookkeeping, convolution_costs
from dpfix.engines.bookkeeping.autotune import Autotune
from dpfix.engines.bookkeeping.blocks import CACHE
from dpfix.engines.bookkeeping.convolution_costs import worth_trying
from dpfix.instrument.function_modes import switch_off_all
from tests.engines.comparing import STEP, floats, ids, plan_for, probe_of

MOST, MOST_OF_ALL = 2.5, 4.0
"""Operations of a private step without and with convolutions, in those of an ordinary one."""


class Operations(TorchDispatchMode):
    """Counts what is dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


class ViT(nn.Module):
    """A vision transformer whose root owns the token and the positions."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm, self.head = nn.Conv2d(3, 16, 4, 4), nn.LayerNorm(16), nn.Linear(16, 4)
        self.cls, self.pos = nn.Parameter(torch.zeros(1, 1, 16)), nn.Parameter(torch.randn(1, 5, 16))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True, norm_first=True) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.pos
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class RMSNorm(nn.Module):
    """Written by hand, with a parameter of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class TiedLanguageModel(nn.Module):
    """Blocks of attention behind a table that is also the head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 16)
        self.norms = nn.ModuleList(RMSNorm(16) for _ in range(5))
        self.qkv = nn.ModuleList(nn.Linear(16, 48, bias=False) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(2))
        self.up, self.down = (
            nn.ModuleList(nn.Linear(a, b, bias=False) for _ in range(2)) for a, b in ((16, 32), (32, 16))
        )

    def forward(self, words: Tensor) -> Tensor:
        x = self.table(words)
        for n in range(2):
            q, k, v = self.qkv[n](self.norms[2 * n](x)).chunk(3, -1)
            x = x + self.out[n](F.scaled_dot_product_attention(q, k, v, is_causal=True))
            x = x + self.down[n](F.silu(self.up[n](self.norms[2 * n + 1](x))))
        return F.linear(self.norms[4](x), self.table.weight)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 5, 2, 2), nn.ReLU(), nn.MaxPool2d(2, 1), nn.Conv2d(4, 6, 3, 2), nn.ReLU(), nn.Flatten(),
        nn.Linear(6 * 2 * 2, 8), nn.ReLU(), nn.Linear(8, 3),
    )  # fmt: skip


class Block(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.one, self.two = (
            nn.Conv2d(channels, out, 3, stride, 1, bias=False),
            nn.Conv2d(out, out, 3, 1, 1, bias=False),
        )
        self.norm1, self.norm2, self.norm3 = (nn.GroupNorm(2, out) for _ in range(3))
        self.around = nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inside = self.norm2(self.two(F.relu(self.norm1(self.one(x)))))
        return F.relu(inside + self.norm3(self.around(x)))


def resnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 1, 1, bias=False), nn.GroupNorm(2, 4), nn.ReLU(), Block(4, 6, 1), Block(6, 8, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


class Siamese(nn.Module):
    """Two views of every picture through one network."""

    def __init__(self) -> None:
        super().__init__()
        self.net = resnet()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.net(x.flip(-1))


class Volumes(nn.Module):
    """Down and up again in three dimensions, with slopes of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv3d(1, 4, 5, 2, 2), nn.ConvTranspose3d(4, 4, 2, 2)
        self.norm, self.slopes, self.out = nn.InstanceNorm3d(4, affine=True), nn.PReLU(4), nn.Conv3d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.up(self.slopes(self.norm(self.down(x))))).mean((2, 3, 4))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "MLP": (mlp, floats(12)),
    "ViT with its own tokens": (ViT, floats(3, 8, 8)),
    "tied language model": (TiedLanguageModel, ids(40, 7)),
}


def operations(model: nn.Module, make: Callable[[int], Tensor], samples: int) -> tuple[int, int]:
    """Those of a private step, and those of an ordinary one."""
    switch_off_all()  # what follows a training that another test has not finished makes operations of its own
    torch.manual_seed(0)
    model = model.double().train()
    batch = (make(samples),)
    ordinary, private = Operations(), Operations()
    unattached = copy.deepcopy(model)
    STEP.loss(unattached, batch).backward()
    with ordinary:
        STEP.loss(unattached, batch).backward()
    plan, _ = plan_for(model, probe_of(make))
    handle = Bookkeeping().attach(model, plan)
    try:
        for mode in (nullcontext(), private):  # the first step tries ways out
            with mode:
                STEP.loss(model, batch).backward()
                handle.clip_and_accumulate(list(model.parameters()), 1.0)
                handle.finish()
    finally:
        handle.detach()
    return private.count, ordinary.count


CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor], tuple[int, ...]]] = {
    "CNN": (cnn, floats(1, 14, 14), (208, 176, 184, 126, 148)),
    "ResNet": (resnet, floats(3, 8, 8), (401, 337, 362, 313, 361)),
    "siamese ResNet": (Siamese, floats(3, 8, 8), (676, 622, 647, 522, 630)),
    "volumes": (Volumes, floats(1, 6, 6, 6), (205, 163, 171, 113, 135)),
}
"""Models with convolutions, and the operations of a private step by the way in which they are measured."""

WAYS = "norms_by_gram", "norms_by_groups", "norms_by_patches", "keep_by_groups", "keep_by_patches"


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Lets every convolution be measured in one way, wherever it can be."""

    def only(way: str) -> None:
        monkeypatch.setattr(convolution_costs, "WORTH_TRYING", math.inf)
        monkeypatch.setattr(
            Autotune, "fastest", lambda self, key, ways, device, whole=None: way if way in ways else min(ways)
        )
        worth_trying.cache_clear()

    yield only
    worth_trying.cache_clear()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_operations_with_convolutions(
    name: str, way: str, only: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    build, make, known = CONVOLUTIONS[name]
    only(way)
    monkeypatch.delitem(CACHE, "cpu")  # the processor is treated like any other device
    (few, ordinary), (many, _) = (operations(build(), make, samples) for samples in (4, 32))
    assert few == many <= known[WAYS.index(way)]
    assert few <= MOST_OF_ALL * ordinary, f"{few} operations, {ordinary} in an ordinary step"
    monkeypatch.setitem(CACHE, "cpu", 1)  # as many blocks as there may be
    some, more = (operations(build(), make, samples)[0] for samples in (16, 64))
    assert some == more <= MOST_OF_ALL * ordinary


@pytest.mark.parametrize("name", MODELS)
def test_operations_are_few_and_do_not_depend_on_the_number_of_samples(name: str) -> None:
    build, make = MODELS[name]
    (few, ordinary), (many, _) = (operations(build(), make, samples) for samples in (4, 32))
    assert few == many
    assert few <= MOST * ordinary, f"{few} operations, {ordinary} in an ordinary step"

"""How many operations a step dispatches: the same for any number of samples, and a few times those of an ordinary step.

On a GPU a step of small operations takes as long as they are many. Counted are forward, backward, clipping and the clipped
sum. Not among the models: convolutions, which on a processor are measured in blocks that fit into its cache, and tables that a
model makes its weights from (relative positions), whose gradients go back sample by sample.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dpfix.engines.bookkeeping import Bookkeeping
from tests.engines.comparing import STEP, floats, ids, plan_for, probe_of

MOST = 3.0
"""Operations of a private step, in those of an ordinary one."""


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


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "MLP": (mlp, floats(12)),
    "ViT with its own tokens": (ViT, floats(3, 8, 8)),
    "tied language model": (TiedLanguageModel, ids(40, 7)),
}


def operations(model: nn.Module, make: Callable[[int], Tensor], samples: int) -> tuple[int, int]:
    """Those of a private step, and those of an ordinary one."""
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


@pytest.mark.parametrize("name", MODELS)
def test_operations_are_few_and_do_not_depend_on_the_number_of_samples(name: str) -> None:
    build, make = MODELS[name]
    (few, ordinary), (many, _) = (operations(build(), make, samples) for samples in (4, 32))
    assert few == many
    assert few <= MOST * ordinary, f"{few} operations, {ordinary} in an ordinary step"

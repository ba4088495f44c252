"""Autocast around the forward pass, forward pass and loss, or the whole step: all train what batches of one say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import dpfix
from tests.helpers import points, setting, train, untold
from tests.reference import clip_norms, clipped_sum, gradients_one_by_one, norm, relative_error

HALF = 5e-2
"""Relative error that is rounding in bfloat16."""
SAMPLES = 8
MODES = ("auto", "bookkeeping", "vmap", "hooks", "functorch", "microbatch")
PLACES = ("forward", "loss", "step")


def autocast(on: bool = True) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=on)


def cnn() -> nn.Module:
    convolutions = (nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(4, 8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(128, 3))


def loss(model: nn.Module, batch: Any, place: str = "forward", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    with autocast():
        out = model(batch[0].to(dtype))
    with autocast(place != "forward"):
        return F.cross_entropy(out, batch[1])


def step(model: nn.Module, optimizer: Any, batch: Any, place: str, dtype: torch.dtype = torch.float32) -> None:
    with autocast(place == "step"):
        optimizer.zero_grad()
        loss(model, batch, place, dtype).backward()
        optimizer.step()


def make(mode: str, batch_size: int, **changes: Any) -> tuple[nn.Module, dpfix.PrivateTraining, Any]:
    """A private training in which nothing is told, without noise; its model, and its samples."""
    model, x, y = cnn(), torch.randn(SAMPLES, 1, 6, 6), torch.arange(SAMPLES) % 3
    return model, *untold(model, (x, y), batch_size, grad_sample_mode=mode, **changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("mode", MODES)
def test_the_clipped_sum_is_that_of_batches_of_one(mode: str, place: str, dtype: torch.dtype) -> None:
    model, (private, optimizer, loader), singles = make(mode, SAMPLES)
    plain = cnn()
    plain.load_state_dict(model.state_dict())
    alone = gradients_one_by_one(plain, loss, singles)
    for clip_norm in clip_norms(alone).values():
        model.load_state_dict(plain.state_dict())
        optimizer.max_grad_norm = clip_norm
        for batch in loader:
            step(private, optimizer, batch, place, dtype)
        moved = {n: (p - model.get_parameter(n)).detach() * SAMPLES for n, p in plain.named_parameters()}
        assert relative_error(moved, clipped_sum(alone, clip_norm)) < HALF


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("mode", MODES)
def test_no_sample_moves_it_by_more_than_the_clip_norm(mode: str, place: str) -> None:
    model, (private, optimizer, loader), _ = make(mode, 1, max_grad_norm=1e-3)
    for batch in loader:
        before = {n: p.detach().double() for n, p in model.named_parameters()}
        step(private, optimizer, batch, place)
        assert norm({n: model.get_parameter(n).detach() - p for n, p in before.items()}) == pytest.approx(
            1e-3, rel=1e-3
        )


@pytest.mark.parametrize("place", PLACES)
def test_a_plain_loop(place: str) -> None:
    """Poisson sampling, noise, several passes, a model that the checks know nothing of before the first step."""
    model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3))
    given = {"optimizer": torch.optim.Adam(model.parameters()), "data_loader": DataLoader(points(), batch_size=8)}
    training = dpfix.make_private_safe(module=model, **given, noise_multiplier=1.0, max_grad_norm=1.0)
    private, optimizer, loader = training
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(4):
        for batch in loader:
            step(private, optimizer, batch, place)
    assert all(
        not torch.equal(p, q) and p.dtype is torch.float32 for p, q in zip(model.parameters(), before, strict=True)
    )
    again = dpfix.make_private_safe(**setting())
    train(again, 12)
    assert training.get_epsilon(1e-5) == again.get_epsilon(1e-5)

"""What tensors hold at once is what was made and not yet given back."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

import dpfix
from dpfix.choose.timing import held
from dpfix.engines import ENGINES
from dpfix.instrument.held_memory import HeldMemory
from tests.audit.setups import labelled, look
from tests.cases import mlp
from tests.helpers import setting

KIB = 1024


def floats(kib: int) -> torch.Tensor:
    return torch.ones(kib * KIB // 4)


def test_what_is_given_back_makes_room() -> None:
    with HeldMemory() as watch:
        a = floats(8)
        b = floats(4)
        del a
        gc.collect()
        c = floats(2)
    assert watch.most == 12 * KIB and b.numel() + c.numel() == 6 * KIB // 4


def test_what_was_there_before_is_not_counted() -> None:
    before = floats(8)
    with HeldMemory() as watch:
        before.add_(1)
        view = before[:10]
        view.mul_(2)
        made = before + 1
        made.view(2, -1)[0].zero_()
    assert watch.most == 8 * KIB


def test_a_backward_pass_is_seen() -> None:
    weight = nn.Parameter(floats(4))
    loss = (weight * 2).exp().sum()
    with HeldMemory() as watch:
        loss.backward()
    assert weight.grad is not None and 4 * KIB <= watch.most <= 12 * KIB


def test_the_report_has_the_memory_of_the_engine_that_was_chosen() -> None:
    report = dpfix.make_private_safe(**setting(mlp(), cache=False)).report
    assert sum(e.seconds is not None for e in report.evidence) > 1
    assert [e.engine for e in report.evidence if e.memory] == [report.engine]
    assert "of tensors" in str(report)


def test_per_sample_gradients_take_memory() -> None:
    wide = nn.Sequential(nn.Linear(6, 400), nn.ReLU(), nn.Linear(400, 3)).double()
    looked = look(wide, labelled(6, samples=8))
    bytes_held = {
        name: held(ENGINES[name], looked.subject, looked.samples, looked.plan, 8) for name in ("bookkeeping", "vmap")
    }
    per_sample = 8 * sum(p.nbytes for p in wide.parameters())
    assert bytes_held["vmap"] is not None and bytes_held["vmap"] > per_sample
    assert bytes_held["bookkeeping"] is not None and bytes_held["bookkeeping"] < per_sample


@pytest.mark.parametrize("cache", [False, True])
def test_watching_leaves_no_trace(cache: bool) -> None:
    model = mlp()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    state = torch.get_rng_state()
    dpfix.make_private_safe(**setting(model, cache=cache))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())

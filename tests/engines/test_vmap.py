"""The whole model under vmap: what only it and the loop over samples can do."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dpfix
from dpfix.choose import select
from dpfix.engines import ENGINES
from dpfix.engines.per_sample.vmap import Vmap
from tests.audit.setups import labelled, look
from tests.cases import classify
from tests.helpers import setting, train


class Scaled(nn.Module):
    """A parameter of its own puts the whole model under ``vmap``, with any of the engines that map."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.head = nn.Parameter(torch.ones(6)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x * self.scale)


def test_a_penalty_on_input_gradients() -> None:
    def penalised(model: nn.Module, batch: Any) -> Tensor:
        x = batch[0].clone().requires_grad_()
        out = model(x)
        (slope,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        return F.cross_entropy(out, batch[1]) + slope.square().sum(1).mean()

    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    assert look(model, labelled(6), penalised).check(Vmap()).passed


def test_torch_forgets_the_padding_token() -> None:
    """Why the engine helps with it; when this fails, torch has learnt of it and the help can go."""
    table = nn.Embedding(7, 4, padding_idx=0).double()
    items = [(torch.tensor([0, 2, i]), i % 3) for i in range(4)]
    looked = look(nn.Sequential(table, nn.Flatten(), nn.Linear(12, 3)).double(), items)
    assert looked.check(Vmap()).passed
    assert not replace(looked, plan=replace(looked.plan, help_vmap=False)).check(Vmap()).passed


def test_per_sample_gradients_of_a_large_batch_are_not_kept_without_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "MATERIALISED_BYTES", 100)
    training = dpfix.make_private_safe(**setting())
    assert training.plan.engine == "bookkeeping"
    reasons = {e.engine: e.reason for e in training.report.evidence}
    assert "it would keep" in reasons["vmap"] and set(reasons) == set(ENGINES)


def test_engines_of_opacus_are_not_tried_where_two_of_dpfixs_own_are_right() -> None:
    tried = dpfix.make_private_safe(**setting(criterion=None, training_step=classify, cache=False)).report.evidence
    passed, reasons = [e.engine for e in tried if e.passed], {e.engine: e.reason for e in tried}
    assert passed == ["bookkeeping", "vmap"]
    assert reasons["hooks"] == reasons["functorch"] == "not tried, `bookkeeping` and `vmap` are right"


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("engine", ["bookkeeping", "vmap"])
def test_the_scripts_own_setting_of_fallback_warnings_is_kept(engine: str, enabled: bool) -> None:
    def warns() -> bool:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.vmap(lambda x: torch.histc(x, 2))(torch.zeros(1, 2))
        return any("performance drop" in str(w.message) for w in caught)

    torch._C._functorch._set_vmap_fallback_warning_enabled(enabled)
    try:
        assert warns() is enabled
        train(dpfix.make_private_safe(**setting(Scaled(), grad_sample_mode=engine)), 1)
        assert warns() is enabled
    finally:
        torch._C._functorch._set_vmap_fallback_warning_enabled(True)

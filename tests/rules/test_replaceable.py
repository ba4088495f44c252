"""Recurrent and attention layers, kept by default and replaced or refused when Opacus's hooks are asked for."""

from __future__ import annotations

import pytest
import torch
from opacus.layers import DPGRU, DPLSTM
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dpfix
from tests.cases import Attention, Recurrent
from tests.helpers import setting


def sequences() -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(torch.randn(12, 5, 4), torch.arange(12) % 3), batch_size=4)


def test_auto_keeps_layer_and_keys() -> None:
    model = Recurrent(nn.LSTM(4, 5, batch_first=True), 5)
    keys, rnn = list(model.state_dict()), model.rnn
    training = dpfix.make_private_safe(**setting(model, data_loader=sequences()))
    assert model.rnn is rnn and list(model.state_dict()) == keys
    assert not training.report.repairs


@pytest.mark.parametrize(("kind", "new"), [(nn.LSTM, DPLSTM), (nn.GRU, DPGRU)])
def test_hooks_use_the_replacement_of_opacus(kind: type[nn.RNNBase], new: type[nn.Module]) -> None:
    model = Recurrent(kind(4, 5, batch_first=True), 5)
    optimizer = torch.optim.SGD(
        [{"params": model.head.parameters()}, {"params": model.rnn.parameters(), "lr": 0.5}], lr=0.1
    )
    x = torch.randn(4, 5, 4)
    before = model(x).detach()
    given = setting(model, optimizer=optimizer, data_loader=sequences(), grad_sample_mode="hooks")
    training = dpfix.make_private_safe(**given)
    assert isinstance(model.rnn, new)
    torch.testing.assert_close(model(x), before)
    assert training.report.repairs[0].fixability is dpfix.Fixability.EXACT
    first, second = optimizer.param_groups
    assert [id(p) for p in first["params"]] == [id(p) for p in model.head.parameters()]
    assert {id(p) for p in second["params"]} == {id(p) for p in model.rnn.parameters()}
    assert second["lr"] == 0.5


def test_earlier_state_of_a_replaced_layer_is_refused() -> None:
    model = Recurrent(nn.LSTM(4, 5, batch_first=True), 5)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(2, 5, 4)).sum().backward()
    optimizer.step()
    rnn = model.rnn
    with pytest.raises(dpfix.OptimizerError, match=r"state for the parameters of a LSTM"):
        dpfix.make_private_safe(
            **setting(model, optimizer=optimizer, data_loader=sequences(), grad_sample_mode="hooks")
        )
    assert model.rnn is rnn


@pytest.mark.parametrize("mode", ["hooks", "functorch"])
def test_attention_with_several_heads_is_refused_by_name(mode: str) -> None:
    model = Attention(batch_first=True, heads=2)
    attention = model.attention
    with pytest.raises(dpfix.ModelError, match=r"DPF007.*MultiheadAttention at `attention`") as refusal:
        dpfix.make_private_safe(**setting(model, data_loader=sequences(), grad_sample_mode=mode))
    assert mode in str(refusal.value) and "'auto'" in str(refusal.value)
    assert model.attention is attention

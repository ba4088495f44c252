"""No recurrent or attention layer has to be replaced: dpfix's engines train torch's own, in all their options.

The audit inside the call compares the clipped sum with a batch-of-one reference; what is asserted here is that the fast
engine passes it with the very layer and keys that the model had.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.data import DataLoader, TensorDataset

import dpfix
from tests.helpers import setting, sgd

T, D = 4, 6


class Around(nn.Module):
    """A layer, the way it is called, and a head."""

    def __init__(self, layer: nn.Module, call: Callable[[Any, Tensor], Tensor], width: int) -> None:
        super().__init__()
        self.layer, self.call, self.head = layer, call, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.call(self.layer, x))


def attend(**given: Any) -> Callable[[Any, Tensor], Tensor]:
    """Self-attention with further arguments; functions of the input are called with it."""

    def call(layer: Any, x: Tensor) -> Tensor:
        x = x if layer.batch_first else x.transpose(0, 1)
        more = {k: v(x) if callable(v) else v for k, v in given.items()}
        key, value = x[..., : layer.kdim], x[..., : layer.vdim]
        out, weights = layer(x, key, value, **more)
        out = out.mean(1 if layer.batch_first else 0)
        return out if weights is None else out + weights.flatten(1).pow(2).sum(1, keepdim=True)

    return call


def one_by_one(layer: Any, x: Tensor) -> Tensor:
    """Two-dimensional input: one sequence at a time."""
    return torch.stack([layer(sequence, sequence, sequence)[0].mean(0) for sequence in x])


def padded(x: Tensor) -> Tensor:
    mask = torch.zeros(x.shape[:2], dtype=torch.bool)
    mask[:, -1] = True
    return mask


def upper(_: Tensor) -> Tensor:
    return torch.ones(T, T, dtype=torch.bool).triu(1)


def recur(layer: Any, x: Tensor) -> Tensor:
    out = layer(x if layer.batch_first else x.transpose(0, 1))[0]
    return out[:, -1] if layer.batch_first else out[-1]


def packed(layer: Any, x: Tensor) -> Tensor:
    lengths = 2 + (x[:, 0, 0] > 0).long()  # of the sample itself
    out = layer(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))[0]
    return pad_packed_sequence(out, batch_first=True, total_length=T)[0].sum(1)


def half_frozen(layer: nn.Module) -> nn.Module:
    next(layer.parameters()).requires_grad_(False)
    return layer


MHA = nn.MultiheadAttention
LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Tensor], Tensor], int]] = {
    "attention": (lambda: MHA(D, 2, batch_first=True), attend(), D),
    "attention, batch second": (lambda: MHA(D, 2), attend(), D),
    "attention, padding mask": (lambda: MHA(D, 2, batch_first=True), attend(key_padding_mask=padded), D),
    "attention, boolean mask": (lambda: MHA(D, 2, batch_first=True), attend(attn_mask=upper), D),
    "attention, causal": (lambda: MHA(D, 2, batch_first=True), attend(attn_mask=upper, is_causal=True), D),
    "attention, no weights": (lambda: MHA(D, 2, batch_first=True), attend(need_weights=False), D),
    "attention, weights per head": (lambda: MHA(D, 2, batch_first=True), attend(average_attn_weights=False), D),
    "attention, bias_kv": (lambda: MHA(D, 2, batch_first=True, add_bias_kv=True), attend(), D),
    "attention, zero_attn": (lambda: MHA(D, 2, batch_first=True, add_zero_attn=True), attend(), D),
    "attention, kdim and vdim": (lambda: MHA(D, 2, batch_first=True, kdim=3, vdim=2), attend(), D),
    "attention, no bias": (lambda: MHA(D, 2, bias=False, batch_first=True), attend(), D),
    "attention, dropout": (lambda: MHA(D, 2, dropout=0.3, batch_first=True), attend(), D),
    "attention, frozen part": (lambda: half_frozen(MHA(D, 2, batch_first=True)), attend(), D),
    "LSTM": (lambda: nn.LSTM(D, 5, batch_first=True), recur, 5),
    "LSTM, time first": (lambda: nn.LSTM(D, 5), recur, 5),
    "LSTM, projection": (lambda: nn.LSTM(D, 5, proj_size=3, batch_first=True), recur, 3),
    "LSTM, two layers, dropout": (lambda: nn.LSTM(D, 5, 2, dropout=0.3, batch_first=True), recur, 5),
    "LSTM, both directions": (lambda: nn.LSTM(D, 5, bidirectional=True, batch_first=True), recur, 10),
    "LSTM, frozen part": (lambda: half_frozen(nn.LSTM(D, 5, batch_first=True)), recur, 5),
    "GRU, two layers": (lambda: nn.GRU(D, 5, 2, batch_first=True), recur, 5),
    "RNN": (lambda: nn.RNN(D, 5, batch_first=True), recur, 5),
}
SLOWER: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Tensor], Tensor], int]] = {
    "attention, 2-D input": (lambda: MHA(D, 2), one_by_one, D),
    "GRU, packed": (lambda: nn.GRU(D, 5, batch_first=True), packed, 5),
}


def kept(name: str, mode: str) -> str:
    """Train privately, check that the layer is the same, and say with which engine."""
    torch.manual_seed(0)
    build, call, width = (LAYERS | SLOWER)[name]
    model = Around(build(), call, width).double()
    original, layer = copy.deepcopy(model), model.layer
    loader = DataLoader(TensorDataset(torch.randn(8, T, D).double(), torch.arange(8) % 3), batch_size=4)
    given = setting(model, data_loader=loader, grad_sample_mode=mode, optimizer=sgd(model, 0.1))
    training = dpfix.make_private_safe(**given)
    assert model.layer is layer and type(layer) is type(original.layer)
    original.load_state_dict(dpfix.plain_state_dict(training[0]), strict=True)
    assert not training.report.repairs
    return training.plan.engine


@pytest.mark.parametrize("name", LAYERS)
def test_the_fast_engine_trains_the_original_layer(name: str) -> None:
    assert kept(name, "bookkeeping") == "bookkeeping"


@pytest.mark.parametrize("name", SLOWER)
def test_some_engine_trains_the_original_layer(name: str) -> None:
    assert kept(name, "auto") in ("bookkeeping", "vmap", "microbatch")

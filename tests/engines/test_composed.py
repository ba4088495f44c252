"""Layers that are several in one, parametrised weights, and weights that are used in more than one way."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from dpfix.engines.bookkeeping import Bookkeeping
from dpfix.engines.bookkeeping.unknown_module import UnknownModuleForward
from dpfix.errors import PlanBrokenError
from dpfix.observe.training_step import TrainingStep, surrogate_loss
from tests.engines.comparing import Case, check, floats, ids, one_by_one, plan_for, probe_of


class Recurrent(nn.Module):
    """A recurrent layer between a linear layer and its outputs, all of which count."""

    def __init__(self, kind: type[nn.RNNBase], state: bool = False, **options: Any) -> None:
        super().__init__()
        self.stem, self.rnn = nn.Linear(3, 4), kind(4, 3, **options)
        ways = self.rnn.num_layers * (2 if self.rnn.bidirectional else 1)
        self.first = nn.Linear(3, ways * 3) if state else None
        self.ways = ways

    def states(self, x: Tensor) -> Any:
        if self.first is None:
            return None
        h = self.first(x[:, 0]).unflatten(1, (self.ways, 3)).transpose(0, 1)
        return (h, h * 0.5) if isinstance(self.rnn, nn.LSTM) else h.contiguous()

    def forward(self, x: Tensor) -> Any:
        states, x = self.states(x), torch.tanh(self.stem(x))
        x = x if self.rnn.batch_first else x.transpose(0, 1)
        out, last = self.rnn(x, states)
        last = last if isinstance(last, tuple) else (last,)
        return (out if self.rnn.batch_first else out.transpose(0, 1)), *(t.transpose(0, 1) for t in last)


class Packed(Recurrent):
    """Sequences of different length; lengths are the first number of every sequence."""

    def __init__(self, kind: type[nn.RNNBase], enforce_sorted: bool = False, **options: Any) -> None:
        super().__init__(kind, **options)
        self.enforce_sorted = enforce_sorted

    def forward(self, x: Tensor) -> Any:
        states = self.states(x)
        lengths = x[:, 0, 0].abs().long().clamp(1, x.shape[1])
        packed = pack_padded_sequence(
            torch.tanh(self.stem(x)), lengths, batch_first=True, enforce_sorted=self.enforce_sorted
        )
        out, last = self.rnn(packed, states)
        last = last if isinstance(last, tuple) else (last,)
        return pad_packed_sequence(out, batch_first=True, total_length=x.shape[1])[0], *(
            t.transpose(0, 1) for t in last
        )


def sequences(lengths: list[int]) -> Callable[[int], Tensor]:
    def make(n: int) -> Tensor:
        x = torch.randn(n, 5, 3, dtype=torch.float64)
        x[:, 0, 0] = torch.tensor(lengths[:n], dtype=torch.float64)
        return x

    return make


class Cells(nn.Module):
    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Any:
        state, out = None, []
        for step in x.unbind(1):
            state = self.cell(step, state)
            out.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(out, 1), state


KINDS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
RECURRENT: dict[str, Case] = {}
for _name, _kind in KINDS.items():
    for _form, _options in {
        "plain": {},
        "batch-first": {"batch_first": True},
        "no-bias": {"bias": False},
        "both-ways": {"bidirectional": True, "batch_first": True},
        "two-layers": {"num_layers": 2, "bidirectional": True},
        "state": {"state": True, "num_layers": 2},
    }.items():
        RECURRENT[f"{_name}-{_form}"] = (lambda k=_kind, o=_options: Recurrent(k, **o), floats(5, 3))
    for _form, _options in {
        "plain": {},
        "both-ways": {"bidirectional": True, "num_layers": 2},
        "state": {"state": True},
    }.items():
        RECURRENT[f"{_name}-packed-{_form}"] = (
            lambda k=_kind, o=_options: Packed(k, **o),
            sequences([2, 5, 1, 3]),
        )
    RECURRENT[f"{_name}-packed-sorted"] = (lambda k=_kind: Packed(k, enforce_sorted=True), sequences([5, 4, 4, 1]))
RECURRENT |= {
    "lstm-one-step": (lambda: Recurrent(nn.LSTM), floats(1, 3)),
    "lstm-projected": (lambda: Recurrent(nn.LSTM, proj_size=2, num_layers=2, bidirectional=True), floats(5, 3)),
    "lstm-projected-packed": (lambda: Packed(nn.LSTM, proj_size=2), sequences([2, 5, 1, 3])),
    "rnn-relu": (lambda: Recurrent(nn.RNN, nonlinearity="relu", num_layers=2), floats(5, 3)),
    "lstm-cell": (lambda: Cells(nn.LSTMCell(4, 3)), floats(3, 4)),
    "gru-cell": (lambda: Cells(nn.GRUCell(4, 3, bias=False)), floats(3, 4)),
    "rnn-cell": (lambda: Cells(nn.RNNCell(4, 3, nonlinearity="relu")), floats(3, 4)),
}


class Attention(nn.Module):
    """Self or cross attention with both outputs."""

    def __init__(self, cross: str = "", mask: str = "", weights: bool = False, **options: Any) -> None:
        super().__init__()
        options = {"batch_first": True} | options
        self.m, self.cross, self.mask, self.weights = nn.MultiheadAttention(6, 2, **options), cross, mask, weights
        # A bias of the keys would only shift all scores of a query: its gradient is made of rounding errors.
        self.k = nn.Linear(6, options.get("kdim") or 6, bias=False)
        self.v = nn.Linear(6, options.get("vdim") or 6)

    def forward(self, x: Tensor) -> Any:
        k = self.k(x) if self.cross else x
        v = self.v(x) if self.cross == "three" else k
        q, k, v = (t if self.m.batch_first else t.transpose(0, 1) for t in (x, k, v))
        k, v = (q, q) if not self.cross else (k, k if self.cross == "two" else v)
        given: dict[str, Any] = {"need_weights": self.weights}
        if self.mask == "causal":
            given |= {"attn_mask": torch.triu(torch.full((3, 3), -torch.inf, dtype=x.dtype), 1)}
        if self.mask == "padding":
            given |= {"key_padding_mask": x[:, :, 0] > 2}
        out, weights = self.m(q, k, v, **given)
        return (out if self.m.batch_first else out.transpose(0, 1)), weights


ATTENTION: dict[str, Case] = {
    name: (lambda o=options: Attention(**o), floats(3, 6))
    for name, options in {
        "self": {},
        "self-time-first": {"batch_first": False},
        "no-bias": {"bias": False},
        "weights": {"weights": True},
        "causal": {"mask": "causal"},
        "padding": {"mask": "padding", "weights": True},
        "cross-two": {"cross": "two", "batch_first": False},
        "cross-three": {"cross": "three"},
        "other-widths": {"cross": "three", "kdim": 5, "vdim": 4},
        "bias-kv": {"add_bias_kv": True},
        "zero-attention": {"add_zero_attn": True, "weights": True},
    }.items()
}


class Encoder(nn.Module):
    """A class token in front of PyTorch's own transformer: parameters of its own around known layers."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 6))
        layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
        self.e = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.e(torch.cat([self.token.expand(len(x), -1, -1), x], 1))


class Bags(nn.Module):
    """Bags of words: rows of equal length, or cut out of one long row."""

    def __init__(self, offsets: bool = False, weighted: bool = False, **options: Any) -> None:
        super().__init__()
        self.bag, self.offsets = nn.EmbeddingBag(7, 4, **options), offsets
        self.weigh = nn.Embedding(7, 1) if weighted else None

    def forward(self, x: Tensor) -> Tensor:
        weights = None if self.weigh is None else self.weigh(x).squeeze(-1)
        if not self.offsets:
            return self.bag(x, per_sample_weights=weights)
        rows = [row[: 1 + int(row[0]) % len(row)] for row in x]  # bags of different size
        ends = torch.tensor([0, *(len(r) for r in rows)]).cumsum(0)
        if weights is not None:
            weights = torch.cat([w[: len(r)] for w, r in zip(weights, rows, strict=True)])
        ends = ends if self.bag.include_last_offset else ends[:-1]
        return self.bag(torch.cat(rows), ends, weights)


BAGS: dict[str, Case] = {
    name: (lambda o=options: Bags(**o), ids(7, 5))
    for name, options in {
        "mean": {},
        "sum": {"mode": "sum"},
        "max": {"mode": "max"},
        "padding": {"padding_idx": 3},
        "max-padding": {"padding_idx": 3, "mode": "max"},
        "weighted": {"weighted": True, "mode": "sum"},
        "offsets": {"offsets": True},
        "offsets-last": {"offsets": True, "include_last_offset": True, "mode": "sum"},
        "offsets-max": {"offsets": True, "mode": "max"},
        "offsets-weighted": {"offsets": True, "weighted": True, "mode": "sum"},
    }.items()
}


class Two(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(7, 7), nn.Bilinear(4, 3, 5, **options)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.a(x))
        return self.b(x[..., :4], x[..., 4:])


class Own(nn.Module):
    """A parameter of its own in front of a layer that is known; one of them is a single number."""

    def __init__(self, layer: nn.Module, whole: bool = False) -> None:
        super().__init__()
        self.scale, self.layer = nn.Parameter(torch.tensor(1.3)), layer
        self.stem = nn.Linear(6, 6) if not whole else None

    def forward(self, x: Tensor) -> Any:
        x = x * self.scale if x.is_floating_point() else x
        out = self.layer(x if self.stem is None else self.stem(x))
        return out * self.scale if isinstance(out, Tensor) else (out[0] * self.scale, out[1])


def old_style(norm: Callable[[nn.Module], nn.Module], layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return norm(layer)


class Fixed(nn.Sequential):
    """Keeps its first layer in evaluation mode, where spectral normalisation writes nothing."""

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        self[1].eval()
        return self


def around(layer: nn.Module, kind: type[nn.Sequential] = nn.Sequential) -> nn.Module:
    return kind(nn.Linear(6, 5), layer, nn.Tanh(), nn.Linear(4, 3))


class Scaled(nn.Module):
    """A parametrisation with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.zeros(4, 1))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.log.exp()


def scaled() -> nn.Module:
    layer = nn.Linear(5, 4)
    nn.utils.parametrize.register_parametrization(layer, "weight", Scaled())
    return around(layer)


PARAMETRISED: dict[str, Case] = {
    "weight-norm": (lambda: around(parametrizations.weight_norm(nn.Linear(5, 4))), floats(6)),
    "weight-norm-positions": (lambda: around(parametrizations.weight_norm(nn.Linear(5, 4, bias=False))), floats(3, 6)),
    "weight-norm-old": (lambda: around(old_style(nn.utils.weight_norm, nn.Linear(5, 4))), floats(6)),
    "weight-norm-conv": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 1), parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.PReLU()),
        floats(2, 5, 5),
    ),
    "weight-norm-and-bilinear": (
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(7, 7)), Two(bias=False)),
        floats(7),
    ),
    "spectral-norm": (lambda: around(parametrizations.spectral_norm(nn.Linear(5, 4)), Fixed), floats(6)),
    "spectral-norm-old": (lambda: around(old_style(nn.utils.spectral_norm, nn.Linear(5, 4)), Fixed), floats(6)),
    "orthogonal": (lambda: around(parametrizations.orthogonal(nn.Linear(5, 4))), floats(6)),
    "own": (scaled, floats(6)),
}


class Transposed(nn.Module):
    """A weight used by its layer, and transposed beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(F.linear(torch.tanh(self.a(x)), self.a.weight.t(), self.a.bias)))


class TiedHead(nn.Module):
    """A language model whose input table is also its output weight; positions see it twice."""

    def __init__(self, again: bool = False) -> None:
        super().__init__()
        self.e, self.a, self.h = nn.Embedding(11, 6, padding_idx=1), nn.Linear(6, 6), nn.Linear(6, 11, bias=False)
        self.h.weight = self.e.weight
        self.again = again

    def forward(self, x: Tensor) -> Tensor:
        y = self.h(torch.tanh(self.a(self.e(x))))
        return y + self.h(self.e(x.flip(1))) if self.again else y


class Elsewhere(nn.Module):
    """A weight that a distant module uses."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Sequential(nn.Linear(6, 6), nn.Tanh()), Borrowing()
        self.b.lender = [self.a[0]]

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


class Borrowing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lender: list[nn.Module] = []
        self.c = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(x @ self.lender[0].weight)


class OnlyFunctional(nn.Module):
    """A layer that is only a place for a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(F.linear(x, self.a.weight * 2, self.a.bias)))


OTHERS: dict[str, Case] = {
    "bilinear": (Two, floats(7)),
    "bilinear-positions": (lambda: Two(bias=False), floats(3, 7)),
    "encoder": (Encoder, floats(3, 6)),
    "one-number": (lambda: Own(nn.Linear(6, 4)), floats(6)),
    "inside-conv": (lambda: Own(nn.Conv1d(3, 4, 3)), floats(3, 6)),
    "inside-lstm": (lambda: Own(nn.LSTM(6, 3, 2, batch_first=True, bidirectional=True)), floats(3, 6)),
    "inside-gru-time-first": (lambda: Own(nn.GRU(6, 3)), floats(3, 6)),
    "inside-cell": (lambda: Own(Cells(nn.LSTMCell(6, 3))), floats(3, 6)),
    "inside-bilinear": (lambda: Own(Two(), whole=True), floats(7)),
    "inside-weight-norm": (lambda: Own(parametrizations.weight_norm(nn.Linear(6, 4))), floats(6)),
    "transposed": (Transposed, floats(6)),
    "transposed-positions": (Transposed, floats(3, 6)),
    "tied-head": (TiedHead, ids(11, 5)),
    "tied-head-twice": (lambda: TiedHead(again=True), ids(11, 5)),
    "elsewhere": (Elsewhere, floats(6)),
    "only-functional": (OnlyFunctional, floats(6)),
}

EVERY = {
    f"{group}-{name}": case
    for group, cases in {
        "rnn": RECURRENT,
        "attention": ATTENTION,
        "bag": BAGS,
        "parametrised": PARAMETRISED,
        "other": OTHERS,
    }.items()
    for name, case in cases.items()
}


@pytest.mark.parametrize("case", EVERY.values(), ids=EVERY)
def test_equals_the_batch_of_one_reference(case: Case) -> None:
    model, make = case
    check(model(), make)


FAST = [name for name in EVERY if not name.startswith("other-") and name != "attention-bias-kv"]


@pytest.mark.parametrize("name", FAST)
def test_known_layers_need_no_vmap(name: str) -> None:
    model, make = EVERY[name]
    built = model().double().train()
    plan, _ = plan_for(built, probe_of(make))
    handle = Bookkeeping().attach(built, plan)
    try:
        assert not any(isinstance(m.__dict__.get("forward"), UnknownModuleForward) for m in built.modules())
    finally:
        handle.detach()


def test_a_packed_sequence_that_may_have_been_sorted_is_not_trusted() -> None:
    model = Packed(nn.LSTM, enforce_sorted=True).double()
    make = sequences([3, 3, 3, 3])
    plan, _ = plan_for(model, probe_of(make))
    handle = Bookkeeping().attach(model, plan)
    with pytest.raises(PlanBrokenError, match="may have been sorted"):
        model(*probe_of(make).batch)
    handle.detach()


class Sorting(Packed):
    """Sorts its sequences itself, so that the rows of the packed sequence are not in the order of the samples."""

    def forward(self, x: Tensor) -> Any:
        order = x[:, 0, 0].argsort(descending=True)
        out = super().forward(x[order])
        return tuple(t[order.argsort()] for t in out)


def test_rows_that_the_model_sorts_are_not_taken_for_samples() -> None:
    model = Sorting(nn.GRU, enforce_sorted=True).double()
    make = sequences([2, 5, 1, 3])
    plan, _ = plan_for(model, probe_of(make))
    handle = Bookkeeping().attach(model, plan)
    with pytest.raises(PlanBrokenError, match="in another order"):
        model(*probe_of(make).batch)
    handle.detach()


AUTOCAST: dict[str, Case] = {
    "lstm": (lambda: Recurrent(nn.LSTM, batch_first=True), lambda n: torch.randn(n, 5, 3)),
    "gru-packed": (lambda: Packed(nn.GRU), lambda n: sequences([2, 5, 1, 3])(n).float()),
    "cell": (lambda: Cells(nn.GRUCell(4, 3)), lambda n: torch.randn(n, 3, 4)),
    "attention": (lambda: Attention(cross="two"), lambda n: torch.randn(n, 3, 6)),
    "bag": (Bags, ids(7, 5)),
    "encoder": (Encoder, lambda n: torch.randn(n, 3, 6)),
}


@pytest.mark.parametrize("case", AUTOCAST.values(), ids=AUTOCAST)
def test_autocast(case: Case) -> None:
    torch.manual_seed(0)
    model, make = case[0]().train(), case[1]

    def run(m: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return surrogate_loss(m(*batch))

    step = TrainingStep(run, "test", loss_known=True)
    probe = probe_of(make)
    plan, _ = plan_for(model, probe, step)
    wanted = one_by_one(model, probe, step)
    handle = Bookkeeping().attach(model, plan)
    step.loss(model, probe.batch).backward()
    handle.collect(list(model.parameters()))
    whole = sum(float(w.square().sum()) for w in wanted.values()) ** 0.5
    for n, p in model.named_parameters():
        assert p.grad_sample.dtype == torch.float32
        assert float((p.grad_sample - wanted[n]).norm()) <= 5e-2 * max(float(wanted[n].norm()), 0.1 * whole), n

"""The book-keeping engine against a batch-of-one reference, layer by layer, in float64."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dpfix
from dpfix.engines.bookkeeping import Bookkeeping
from dpfix.observe.run import observe
from dpfix.observe.training_step import Subject, TrainingStep, surrogate_loss
from dpfix.plan import Plan
from tests.engines.comparing import SAMPLES, Case, check, close, floats, ids, loss_of, one_by_one, plan_for, probe_of
from tests.helpers import setting


class Seq(nn.Module):
    """Something before and after the layer, so that the input gradient matters too."""

    def __init__(self, layer: nn.Module, before: nn.Module | None = None) -> None:
        super().__init__()
        self.before, self.layer = before, layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x if self.before is None else torch.tanh(self.before(x)))


LINEAR = {
    "linear": (lambda: Seq(nn.Linear(5, 4), nn.Linear(6, 5)), floats(6)),
    "linear-no-bias": (lambda: Seq(nn.Linear(5, 4, bias=False), nn.Linear(6, 5)), floats(6)),
    "linear-3d": (lambda: Seq(nn.Linear(5, 4), nn.Linear(6, 5)), floats(3, 6)),
    "linear-4d": (lambda: Seq(nn.Linear(5, 40), nn.Linear(60, 5)), floats(3, 2, 60)),
    "linear-many-positions": (lambda: Seq(nn.Linear(3, 2), nn.Linear(2, 3)), floats(200, 2)),
    "linear-few-positions": (lambda: Seq(nn.Linear(90, 80), nn.Linear(70, 90)), floats(3, 70)),
}
CONVOLUTIONS: dict[str, Case] = {}
for _d, (_conv, _up) in enumerate(
    [(nn.Conv1d, nn.ConvTranspose1d), (nn.Conv2d, nn.ConvTranspose2d), (nn.Conv3d, nn.ConvTranspose3d)], start=1
):
    for _name, _options in {
        "plain": {},
        "stride-padding": {"stride": 2, "padding": 1},
        "dilation": {"dilation": 2, "padding": 2},
        "groups": {"groups": 2, "padding": 1},
        "depthwise": {"groups": 4, "bias": False},
        "same": {"padding": "same", "dilation": 2},
        "valid": {"padding": "valid"},
        "reflect": {"padding": 1, "padding_mode": "reflect"},
        "circular": {"padding": 2, "padding_mode": "circular"},
        "replicate-same": {"padding": "same", "padding_mode": "replicate"},
        "zeros-stride-3": {"stride": 3, "padding": 2},
    }.items():
        CONVOLUTIONS[f"conv{_d}d-{_name}"] = (
            lambda c=_conv, d=_d, o=_options: Seq(c(4, 4, 3, **o), c(2, 4, 1)),
            floats(2, *[7] * _d),
        )
    CONVOLUTIONS[f"conv{_d}d-same-even"] = (
        lambda c=_conv: Seq(c(4, 3, 4, padding="same"), c(2, 4, 1)),
        floats(2, *[6] * _d),
    )
    CONVOLUTIONS[f"conv{_d}d-pointwise-stride"] = (lambda c=_conv: c(2, 30, 1, stride=2), floats(2, *[6] * _d))
    for _name, _options in {
        "plain": {},
        "stride-output": {"stride": 2, "padding": 1, "output_padding": 1},
        "groups": {"groups": 2, "stride": 2},
        "dilation": {"dilation": 2, "bias": False},
        "stride-2-kernel-2": {"stride": 2},
    }.items():
        _kernel = 2 if _name.endswith("2") else 3
        CONVOLUTIONS[f"transposed{_d}d-{_name}"] = (
            lambda c=_up, u=_conv, d=_d, o=_options, k=_kernel: Seq(c(4, 6, k, **o), u(2, 4, 1)),
            floats(2, *[5] * _d),
        )
CONVOLUTIONS["conv2d-large-kernel-share"] = (lambda: nn.Conv2d(16, 24, 3, padding=1), floats(16, 4, 4))
CONVOLUTIONS["conv2d-small"] = (lambda: nn.Conv2d(2, 2, 3, padding=1), floats(2, 20, 20))


def wide(layer: nn.Module, channels: int = 4) -> Callable[[], nn.Module]:
    return lambda: Seq(copy.deepcopy(layer), nn.Conv2d(2, channels, 1))


def frozen_norm(c: int) -> nn.Module:
    norm = nn.BatchNorm2d(c)
    norm.running_mean.normal_()  # type: ignore[union-attr]
    norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return norm.eval()


class EvalNorm(Seq):
    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        self.layer.eval()
        return self


NORMS: dict[str, Case] = {
    "group": (wide(nn.GroupNorm(2, 4)), floats(2, 5, 5)),
    "group-flat": (lambda: Seq(nn.GroupNorm(2, 4), nn.Linear(3, 4)), floats(3)),
    "instance2d": (wide(nn.InstanceNorm2d(4, affine=True)), floats(2, 5, 5)),
    "instance1d": (lambda: Seq(nn.InstanceNorm1d(4, affine=True), nn.Conv1d(2, 4, 1)), floats(2, 6)),
    "instance3d": (lambda: Seq(nn.InstanceNorm3d(4, affine=True), nn.Conv3d(2, 4, 1)), floats(2, 4, 4, 4)),
    "layer": (lambda: Seq(nn.LayerNorm(4), nn.Linear(3, 4)), floats(5, 3)),
    "layer-1d": (lambda: Seq(nn.LayerNorm(4), nn.Linear(3, 4)), floats(3)),
    "layer-no-bias": (lambda: Seq(nn.LayerNorm(4, bias=False), nn.Linear(3, 4)), floats(5, 3)),
    "layer-two-dims": (lambda: Seq(nn.LayerNorm((5, 4)), nn.Linear(3, 4)), floats(5, 3)),
    "layer-long": (lambda: Seq(nn.LayerNorm(64), nn.Linear(3, 64)), floats(300, 3)),
    "rms": (lambda: Seq(nn.RMSNorm(4), nn.Linear(3, 4)), floats(5, 3)),
    "rms-eps": (lambda: Seq(nn.RMSNorm((5, 4), eps=0.1), nn.Linear(3, 4)), floats(5, 3)),
    "batch-in-eval": (lambda: EvalNorm(frozen_norm(4), nn.Conv2d(2, 4, 1)), floats(2, 5, 5)),
    "prelu": (wide(nn.PReLU()), floats(2, 5, 5)),
    "prelu-channels": (wide(nn.PReLU(4)), floats(2, 5, 5)),
    "prelu-flat": (lambda: Seq(nn.PReLU(4), nn.Linear(3, 4)), floats(3)),
}


class Positions(nn.Module):
    def __init__(self, two_d: bool = False) -> None:
        super().__init__()
        self.t, self.p, self.two_d = nn.Embedding(11, 6), nn.Embedding(5, 6), two_d
        self.h = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        position = torch.arange(x.shape[1])
        return self.h(torch.tanh(self.t(x) + self.p(position[None] if self.two_d else position)))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.h = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
        self.h.weight = self.e.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.h(torch.tanh(self.e(x)))


class Repeated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(torch.tanh(self.a(x)))
        self.c(hidden)  # never used
        return self.a(hidden + self.c(x)) * self.c(x.detach()).detach()


class Reshaped(nn.Module):
    """Rows of one sample folded into the batch, and the batch in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 5), nn.Conv1d(1, 3, 3), nn.GroupNorm(1, 3)
        self.d = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        y = torch.tanh(self.a(x.reshape(n * t, 6)))
        y = torch.tanh(self.c(self.b(y[:, None]))).mean(2).reshape(n, t, 3)
        return self.d(y.transpose(0, 1)).transpose(0, 1)


class Interleaved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Conv1d(1, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([x[:, 0], x[:, 1]])
        y = self.b(torch.tanh(self.a(y))[:, None]).flatten(1)
        return torch.stack(y.chunk(2), 1)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.n = nn.Conv2d(2, 4, 3), nn.Linear(3, 4), nn.GroupNorm(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y += 1
        y = self.n(y)
        y.mul_(2)
        y = F.relu_(y)
        z = self.b(y)
        z += 1
        return z.relu_()


class ClassToken(nn.Module):
    """Parameters of its own next to layers."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Parameter(torch.zeros(1, 1, 6)), nn.Parameter(torch.zeros(1, 6, 6))
        self.gamma = nn.ParameterList([nn.Parameter(torch.ones(6))])
        self.a, self.c, self.n = nn.Linear(6, 6), nn.Conv1d(6, 6, 3, padding=1), nn.GroupNorm(2, 6)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        x = x + self.gamma[0] * torch.tanh(self.a(x))
        return {"out": self.n(self.c(x.transpose(1, 2))), "token": x[:, 0]}


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.a = ClassToken(), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(torch.tanh(self.inner(x)["token"]))


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.s = Inner(), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.s * self.inner(x)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.a(x)), self.b.weight, self.b.bias)


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.m, self.h = nn.MultiheadAttention(6, 2, **options), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.h(self.m(x, x, x, need_weights=False)[0])


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Bilinear(4, 3, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(x[:, :4], x[:, 4:])


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.a, self.b, self.reentrant = nn.Linear(6, 5), nn.Sequential(nn.Linear(5, 5), nn.LayerNorm(5)), reentrant

    def forward(self, x: Tensor) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        return checkpoint(self.b, torch.tanh(self.a(x)), use_reentrant=self.reentrant)


def normed() -> nn.Module:
    return Seq(nn.utils.parametrizations.weight_norm(nn.Linear(5, 4)), nn.Linear(6, 5))


def partly_frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.LayerNorm(4))
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    model[3].weight.requires_grad_(False)
    return model


class Views(nn.Module):
    """Several views of a sample, one call of the same layers for each.

    Args:
        *steps: of every view, the part of the sample's positions that it is: every one, every second, ...
    """

    def __init__(self, *steps: int, groups: int = 1) -> None:
        super().__init__()
        self.steps, self.head = steps, nn.Linear(6, 4)
        self.first = nn.Conv2d(4, 6, 3, 2, 1, groups=groups, bias=False)
        self.second = nn.ConvTranspose2d(6, 6, 2, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        views = [x[..., ::step].roll(n, 1) for n, step in enumerate(self.steps)]
        seen = [torch.tanh(self.second(torch.tanh(self.first(v)))).mean((2, 3)) for v in views]
        return torch.stack([self.head(v) for v in seen], 1)


MODELS: dict[str, Case] = {
    "two-views": (lambda: Views(1, 1), floats(4, 9, 9)),
    "three-views-in-groups": (lambda: Views(1, 1, 1, groups=2), floats(4, 7, 6)),
    "views-of-several-sizes": (lambda: Views(1, 2, 1, 2), floats(4, 8, 8)),
    "embedding": (lambda: nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 3)), ids(7, 6)),
    "embedding-padding": (lambda: nn.Sequential(nn.Embedding(7, 5, padding_idx=2), nn.Linear(5, 3)), ids(7, 6)),
    "embedding-single": (lambda: nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 3)), ids(7)),
    "embedding-4d": (lambda: nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 3)), ids(7, 2, 3)),
    "positions": (Positions, ids(11, 5)),
    "positions-2d": (lambda: Positions(two_d=True), ids(11, 5)),
    "tied": (Tied, ids(11, 5)),
    "repeated": (Repeated, floats(6)),
    "repeated-3d": (Repeated, floats(3, 6)),
    "reshaped": (Reshaped, floats(5, 6)),
    "interleaved": (Interleaved, floats(2, 6)),
    "in-place": (InPlace, floats(2, 5, 5)),
    "class-token": (ClassToken, floats(5, 6)),
    "inner": (Inner, floats(5, 6)),
    "nested": (Nested, floats(5, 6)),
    "functional": (Functional, floats(6)),
    "attention": (lambda: Attention(batch_first=True), floats(3, 6)),
    "bilinear": (Two, floats(7)),
    "checkpoint": (lambda: Checkpointed(False), floats(3, 6)),
    "checkpoint-reentrant": (lambda: Checkpointed(True), floats(3, 6)),
    "weight-norm": (normed, floats(6)),
    "partly-frozen": (partly_frozen, floats(3, 6)),
    "root-is-a-layer": (lambda: nn.Linear(6, 5), floats(6)),
}


class Transposed(nn.Module):
    """A layer whose output goes on as ``[batch, positions, channels]``, so that its gradient comes back transposed."""

    def __init__(self, layer: nn.Module, channels: int = 4) -> None:
        super().__init__()
        self.first, self.layer, self.head = nn.Conv1d(2, channels, 1, bias=False), layer, nn.Linear(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(self.first(x))).transpose(1, 2))


TRANSPOSED: dict[str, Case] = {
    f"transposed-{name}": (lambda layer=layer: Transposed(copy.deepcopy(layer)), floats(2, 6))
    for name, layer in {
        "group-norm": nn.GroupNorm(2, 4),
        "instance-norm": nn.InstanceNorm1d(4, affine=True),
        "layer-norm": nn.LayerNorm(6),
        "conv1d": nn.Conv1d(4, 4, 3, padding=1, groups=2),
        "conv-transpose1d": nn.ConvTranspose1d(4, 4, 3, padding=1),
        "prelu": nn.PReLU(4),
        "linear": nn.Linear(6, 6),
    }.items()
}

EVERY = TRANSPOSED | LINEAR | CONVOLUTIONS | NORMS | MODELS


@pytest.mark.parametrize("case", EVERY.values(), ids=EVERY)
def test_equals_the_batch_of_one_reference(case: Case) -> None:
    model, make = case
    check(model(), make)


def test_channels_last_input() -> None:
    make = floats(4, 6, 6)
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.GroupNorm(2, 6), nn.Conv2d(6, 4, 3, stride=2), nn.PReLU(4))
    check(model, lambda n: make(n).to(memory_format=torch.channels_last))


def test_sum_reduction() -> None:
    model, make = nn.Linear(6, 3).double(), floats(6)
    probe = probe_of(make)
    step = TrainingStep(lambda m, b: m(*b).square().sum(), "test", loss_known=True)
    record, wanted = observe(Subject(model, step), probe), one_by_one(model, probe, step)
    handle = Bookkeeping().attach(model, Plan("", "", calls=record.calls, layers=record.layers, loss_reduction="sum"))
    step.loss(model, probe.batch).backward()
    assert handle.collect([model.weight]) == [SAMPLES]
    close(model.weight.grad_sample, wanted["weight"], "weight", 1e-9)


def attached(model: nn.Module, make: Callable[[int], Any]) -> tuple[Any, Any, list[nn.Parameter]]:
    model.double().train()
    probe = probe_of(make)
    plan, _ = plan_for(model, probe)
    return Bookkeeping().attach(model, plan), probe.batch, list(model.parameters())


def test_two_forwards_before_one_backward_add_up() -> None:
    handle, batch, parameters = attached(nn.Linear(6, 3), floats(6))
    model = handle.model
    (loss_of(model, batch) + 2 * loss_of(model, batch)).backward()
    assert handle.collect(parameters) == [SAMPLES]
    twice = parameters[0].grad_sample
    handle.finish()
    loss_of(model, batch).backward()
    handle.collect(parameters)
    assert torch.allclose(twice, 3 * parameters[0].grad_sample)


def test_a_forward_after_a_backward_is_a_new_iteration() -> None:
    handle, batch, parameters = attached(nn.Linear(6, 3), floats(6))
    for _ in range(2):
        loss_of(handle.model, batch).backward()
    assert handle.announce(parameters) == [SAMPLES, SAMPLES]
    assert [len(g) for g in parameters[0].grad_sample] == [SAMPLES, SAMPLES]


def test_zero_grad_between_forward_and_backward_loses_nothing() -> None:
    handle, batch, parameters = attached(nn.Linear(6, 3), floats(6))
    loss = loss_of(handle.model, batch)
    handle.clear()
    loss.backward()
    assert handle.announce(parameters) == [SAMPLES]
    handle.clear()
    assert handle.announce(parameters) == []


def test_a_forward_without_backward_does_not_count() -> None:
    handle, batch, parameters = attached(nn.Linear(6, 3), floats(6))
    loss_of(handle.model, batch)
    loss_of(handle.model, batch).backward()
    assert handle.announce(parameters) == [SAMPLES]


def test_other_batch_sizes_than_the_probe() -> None:
    torch.manual_seed(0)
    model = Reshaped().double()
    handle, _, parameters = attached(model, floats(5, 6))
    batch = floats(7, 6)(9)
    loss_of(model, (batch,)).backward()
    assert handle.collect(parameters) == [9]
    found = [p.grad_sample.clone() for p in parameters]
    handle.detach()
    for i in range(9):
        model.zero_grad()
        loss_of(model, (batch[i : i + 1],)).backward()
        for p, g in zip(parameters, found, strict=True):
            close(g[i], p.grad, str(tuple(p.shape)), 1e-9)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_of_the_model_are_ordinary_models(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    handle, (x,), _ = attached(ClassToken(), floats(5, 6))
    copied = duplicate(handle.model)
    copied(x)["out"].sum().backward()
    assert all(p.grad is not None for p in copied.parameters())
    assert not handle._iterations.arrived()


def test_a_row_count_that_does_not_fit_is_refused() -> None:
    handle, _, _ = attached(Reshaped(), floats(5, 6))
    with pytest.raises(Exception, match="does not hold 4 samples"):
        handle._layers["a"][0].inputs[0][1].samples  # noqa: B018
        from dpfix.layout.rows import rows_of

        rows_of(torch.zeros(7, 2), handle._layers["a"][0].inputs[0][1], 4)


def test_autocast_accumulates_in_single_precision() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(36, 3))
    make = lambda n: torch.randn(n, 2, 5, 5)  # noqa: E731

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
    for n, p in model.named_parameters():
        assert p.grad_sample.dtype == torch.float32
        close(p.grad_sample, wanted[n], n, 5e-2)


def test_a_penalty_on_input_gradients_goes_to_an_engine_that_can_differentiate_twice() -> None:
    def penalised(model: nn.Module, batch: Any) -> Tensor:
        x = batch[0].clone().requires_grad_()
        out = model(x)
        (slope,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        return F.cross_entropy(out, batch[1]) + slope.square().sum(1).mean()

    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    training = dpfix.make_private_safe(**setting(model, training_step=penalised))
    assert training.plan.engine not in {"bookkeeping", "hooks", "functorch"}

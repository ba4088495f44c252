"""Calls of batch_norm inside a forward: redirected where they mix samples, left where they do not, exported as they train."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dpfix
from dpfix.report.finding import Fixability
from tests.helpers import setting


class Activated(nn.BatchNorm2d):
    """A subclass that calls ``F.batch_norm`` itself and adds an activation and dropout, as in timm."""

    def __init__(self, features: int, drop: float = 0.0) -> None:
        super().__init__(features, eps=0.125)
        self.drop, self.act = nn.Dropout(drop), nn.SiLU()

    def forward(self, input: Tensor) -> Tensor:
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        x = F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps
        )
        return self.act(self.drop(x))


class Scaled(nn.BatchNorm2d):
    """A subclass that goes on with what the layer computes."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class ScaledSync(nn.SyncBatchNorm):
    """The same of a synchronised layer."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class ByTorch(nn.BatchNorm2d):
    """The function of ``torch`` itself, whose arguments have another order."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.batch_norm(
            x, self.weight, self.bias, self.running_mean, self.running_var, self.training, 0.1, self.eps, True
        )


class Branches(nn.BatchNorm2d):
    """Training and evaluation are two lines."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)


class Functional(nn.Module):
    """Weights and statistics of a module that is no BatchNorm, beside a weight that is standardised."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(features, features, 3, padding=1, bias=False)
        self.gain, self.shift = nn.Parameter(torch.ones(features)), nn.Parameter(torch.zeros(features))
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("var", torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        w = self.conv.weight
        w = F.batch_norm(w.reshape(1, len(w), -1), None, None, training=True).reshape_as(w)
        return F.batch_norm(F.conv2d(x, w, padding=1), self.mean, self.var, self.gain, self.shift, self.training)


class Net(nn.Module):
    """A convolution, what is tried, and a head."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), norm, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).mean((2, 3)))


def images() -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(torch.randn(12, 3, 6, 6), torch.arange(12) % 3), batch_size=4)


def make(layer: nn.Module, **changes: object) -> tuple[Net, dpfix.PrivateTraining]:
    torch.manual_seed(5)
    net = Net(layer)
    return net, dpfix.make_private_safe(**setting(net, data_loader=images(), **changes))


KINDS = (Activated, Scaled, ScaledSync, ByTorch, Branches, Functional)


@pytest.mark.parametrize("kind", KINDS)
def test_the_clipped_sum_is_that_of_batches_of_one(kind: type[nn.Module]) -> None:
    net, training = make(kind(8), noise_multiplier=0.0, poisson_sampling=False)
    model, optimizer, loader = training
    plain, x, y = copy.deepcopy(net), *next(iter(DataLoader(loader.dataset, batch_size=4)))
    total = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for i in range(4):
        loss = F.cross_entropy(plain(x[i : i + 1]), y[i : i + 1])
        grads = torch.autograd.grad(loss, list(plain.parameters()))
        factor = min(1.0, 1.0 / (float(torch.cat([g.flatten() for g in grads]).norm()) + 1e-6))
        for name, g in zip(total, grads, strict=True):
            total[name] += factor * g
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    x, y = next(iter(loader))
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    for name, p in net.named_parameters():
        torch.testing.assert_close((before[name] - p.detach()) / 0.1 * 4, total[name], rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_announced_with_its_line_and_keeps_class_and_parameters(kind: type[nn.Module]) -> None:
    norm = kind(8)
    parameters = dict(norm.named_parameters())
    net, training = make(norm)
    (finding,) = [f for f in training.report.repairs if f.code == "DPF001"]
    assert finding.fixability is Fixability.CHANGES_MODEL and finding.path == "norm"
    assert "test_batch_norm_calls.py:" in finding.fact and "GroupNorm(4, 8)" in finding.fix
    assert net.norm is norm and isinstance(norm, kind) and type(norm).__name__ == kind.__name__
    assert all(dict(norm.named_parameters())[name] is p for name, p in parameters.items())
    assert training.plan.engine in {"bookkeeping", "vmap"}


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_computes_what_was_trained_and_statistics_are_not_saved(kind: type[nn.Module]) -> None:
    net, _ = make(kind(8))
    with pytest.warns(dpfix.DPFixWarning, match="`norm`.*GroupNorm"):
        exported = dpfix.export_plain(net)
    assert dpfix.changed_layers(net).keys() == {"norm"}
    again = pickle.loads(pickle.dumps(exported))
    x = torch.randn(5, 3, 6, 6)
    trained = net(x)
    for model in (net, exported, again):
        model.eval()
        torch.testing.assert_close(model(x), trained)
        assert not {"norm.running_mean", "norm.mean"} & model.state_dict().keys()
    with pytest.raises(RuntimeError, match="Missing key"):
        Net(kind(8)).load_state_dict(exported.state_dict())


def test_what_the_layer_adds_is_kept() -> None:
    net, _ = make(Activated(8, drop=0.5))
    x = torch.randn(2, 8, 4, 4)
    norm = net.norm
    norm.eval()
    wanted = F.silu(F.group_norm(x, 4, norm.weight, norm.bias, 0.125))
    torch.testing.assert_close(norm(x), wanted)
    norm.train()
    assert float((norm(x) == 0).float().mean()) > 0.3


@pytest.mark.parametrize(("norm", "groups"), [("group", 4), ("layer", 1), ("instance", 8)])
def test_norm_chooses_the_replacement(norm: str, groups: int) -> None:
    net, _ = make(Scaled(8), norm=norm)
    x = torch.randn(2, 8, 4, 4)
    torch.testing.assert_close(net.norm(x), 2 * F.group_norm(x, groups, net.norm.weight, net.norm.bias))


def test_the_root_itself_is_repaired() -> None:
    norm = nn.BatchNorm1d(16)
    data = DataLoader(TensorDataset(torch.randn(12, 16), torch.arange(12) % 3), batch_size=4)
    dpfix.make_private_safe(**setting(norm, data_loader=data))
    x = torch.randn(3, 16)
    torch.testing.assert_close(norm(x), F.group_norm(x, 2, norm.weight, norm.bias))


class Adaptive(nn.Module):
    """Every sample normalised by itself, written as one row with many channels."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(features, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(1, -1, *x.shape[2:])
        return F.batch_norm(rows, None, None, training=True).view_as(x) * self.gain


class Fixed(nn.BatchNorm2d):
    """Its statistics are constants in training mode, too."""

    def forward(self, input: Tensor) -> Tensor:
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, False)


@pytest.mark.parametrize("kind", [Adaptive, Fixed])
def test_what_mixes_nothing_computes_what_it_did(kind: type[nn.Module]) -> None:
    norm, x = kind(8), torch.randn(3, 8, 4, 4)
    before = norm(x)
    make(norm)
    torch.testing.assert_close(norm(x), before)
    torch.testing.assert_close(norm.eval()(x), before)


def test_frozen_statistics_beside_a_repair_stay() -> None:
    net = Functional(8)
    net.add_module("frozen", nn.BatchNorm2d(8).eval())
    x = torch.randn(3, 8, 4, 4)
    before = net.frozen(x)
    _, training = make(net)
    assert training.plan.fixed_norms == ("norm.frozen",)
    torch.testing.assert_close(net.frozen(x), before)


class Reparametrised(nn.Module):
    """A convolution and an identity, each with its norm, that become one convolution for inference."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(features, features, 3, padding=1, bias=False)
        self.norm, self.identity = Scaled(features), Scaled(features)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.identity(x)

    def fold(self) -> Tensor:
        scale = self.norm.weight / (self.norm.running_var + self.norm.eps).sqrt()
        return self.conv.weight * scale.view(-1, 1, 1, 1)


def test_a_block_is_not_folded_by_statistics_that_nobody_tracked() -> None:
    net, training = make(Reparametrised(8))
    assert [f.path for f in training.report.repairs if f.code == "DPF001"] == ["norm.norm", "norm.identity"]
    for block in (net.norm, copy.deepcopy(net.norm)):
        with pytest.raises(AttributeError, match=r"running_var: .*GroupNorm.*cannot be folded into a convolution"):
            block.fold()
        block(torch.randn(2, 8, 4, 4))


class ByHand(nn.BatchNorm2d):
    """The statistics are computed by hand."""

    def forward(self, input: Tensor) -> Tensor:
        return (input - input.mean((0, 2, 3), keepdim=True)) * self.weight.view(-1, 1, 1)


def test_statistics_by_hand_are_refused_and_nothing_is_changed() -> None:
    norm = ByHand(8)
    with pytest.raises(dpfix.CoupledModelError, match=r"DPF013.*ByHand at `norm`"):
        make(norm)
    assert type(norm) is ByHand


def test_a_refusal_leaves_class_and_state_dict_as_they_were() -> None:
    net = Net(Functional(8))
    keys = net.state_dict().keys()
    with pytest.raises(dpfix.DPFixError):
        dpfix.make_private_safe(
            **setting(net, data_loader=images(), criterion=lambda out, y: F.cross_entropy(out - out.mean(0), y))
        )
    assert type(net.norm) is Functional
    assert net.state_dict().keys() == keys


def test_statistics_of_a_subclass_are_folded() -> None:
    layer = Activated(64)
    layer.running_mean.uniform_(-1, 1)
    layer.running_var.uniform_(0.5, 4)
    x = layer.running_mean.view(-1, 1, 1) + layer.running_var.sqrt().view(-1, 1, 1) * torch.randn(4, 64, 32, 32)
    before = layer.eval()(x).detach()
    model = nn.Sequential(nn.Conv2d(3, 64, 1), layer.train(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 3))
    data = TensorDataset(torch.randn(12, 3, 6, 6), torch.arange(12) % 3)
    dpfix.make_private_safe(**setting(model, data_loader=DataLoader(data, batch_size=4), norm="folded"))
    assert float((model[1](x).detach() - before).std() / before.std()) < 0.05

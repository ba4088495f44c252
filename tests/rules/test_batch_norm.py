"""The BatchNorm rule in detail: every kind, every alias, every option."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dpfix
from dpfix.instrument.batch_norm_calls import group_count
from tests.helpers import setting


def images(classes: int = 3) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(torch.randn(12, 3, 6, 6), torch.arange(12) % classes), batch_size=4)


class Net(nn.Module):
    """A convolution, a norm that may go by several names, and a head."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), norm, nn.Linear(8, 3)
        self.again = nn.ModuleDict({"norm": norm})

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        return self.head(self.again["norm"](x.tanh()).mean((2, 3)))


def make(layer: nn.Module, **changes: object) -> tuple[Net, dpfix.PrivateTraining]:
    net = Net(layer)
    return net, dpfix.make_private_safe(**setting(net, data_loader=images(), **changes))


def test_aliases_get_one_replacement_with_everything_kept() -> None:
    norm = nn.BatchNorm2d(8, eps=0.25).requires_grad_(True)
    norm.bias.requires_grad_(False)
    net, training = make(norm)
    assert net.norm is net.again["norm"]
    assert type(net.norm) is nn.GroupNorm
    assert net.norm.weight is norm.weight and net.norm.bias is norm.bias
    assert net.norm.eps == 0.25
    assert not net.norm.bias.requires_grad
    assert net.norm.training
    (finding,) = training.report.repairs
    assert "GroupNorm(4, 8)" in finding.fix and "`norm`" in finding.fact


def test_double_precision_is_kept() -> None:
    net = Net(nn.BatchNorm2d(8)).double()
    data = DataLoader(TensorDataset(torch.randn(12, 3, 6, 6).double(), torch.arange(12) % 3), batch_size=4)
    dpfix.make_private_safe(**setting(net, data_loader=data))
    assert net.norm.weight.dtype is torch.float64


@pytest.mark.parametrize(
    ("norm", "kind", "groups"),
    [("group", nn.GroupNorm, 4), ("layer", nn.GroupNorm, 1), ("instance", nn.InstanceNorm2d, None)],
)
def test_norm_chooses_the_replacement(norm: str, kind: type[nn.Module], groups: int | None) -> None:
    net, _ = make(nn.BatchNorm2d(8), norm=norm)
    assert type(net.norm) is kind
    assert groups is None or net.norm.num_groups == groups


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.SyncBatchNorm])
@pytest.mark.parametrize("affine", [True, False])
def test_every_kind_is_replaced(kind: type[nn.Module], affine: bool) -> None:
    net, _ = make(kind(8, affine=affine))
    assert type(net.norm) is nn.GroupNorm
    assert net.norm.affine is affine
    assert (net.norm.weight is not None) is affine


def test_lazy_batch_norm_is_created_and_replaced() -> None:
    net, training = make(nn.LazyBatchNorm2d())
    assert type(net.norm) is nn.GroupNorm
    assert "DPF001" in {f.code for f in training.report.repairs}


class Plain(nn.BatchNorm2d):
    """A subclass without a forward of its own."""


def test_subclass_without_forward_is_replaced() -> None:
    net, _ = make(Plain(8))
    assert type(net.norm) is nn.GroupNorm


def test_frozen_in_eval_stays() -> None:
    norm = nn.BatchNorm2d(8).requires_grad_(False).eval()
    net, training = make(norm)
    assert net.norm is norm
    assert training.plan.fixed_norms == ("norm",)


def test_frozen_in_training_mode_is_replaced() -> None:
    net, _ = make(nn.BatchNorm2d(8).requires_grad_(False))
    assert type(net.norm) is nn.GroupNorm
    assert not net.norm.weight.requires_grad


def test_batch_norm_on_vectors_keeps_information() -> None:
    """One element per group would normalise every vector to zero."""
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 3))
    dpfix.make_private_safe(**setting(model))
    out = model[1](torch.randn(4, 16))
    assert float(out.detach().abs().min()) > 0
    assert model[1].num_groups == 2


@pytest.mark.parametrize("smallest", [2, 8])
def test_groups_never_hold_one_element(smallest: int) -> None:
    for channels in range(1, 300):
        groups = group_count(channels, smallest)
        assert channels % groups == 0 and 1 <= groups <= 32
        assert groups == 1 or channels // groups >= smallest


def pretrained(layer: nn.BatchNorm2d) -> nn.BatchNorm2d:
    """A layer with statistics and weights as after training."""
    draw = torch.Generator().manual_seed(0)
    for name, low, high in (("running_mean", -1, 1), ("running_var", 0.5, 4), ("weight", 0.5, 2), ("bias", -1, 1)):
        getattr(layer, name).data.uniform_(low, high, generator=draw)
    return layer


@pytest.mark.parametrize("norm", ["folded", "group"])
def test_folded_statistics_keep_the_function(norm: str) -> None:
    """On inputs as the statistics say: many channels and positions, so that a sample's groups are as they are on average."""
    layer = pretrained(nn.BatchNorm2d(64))
    x = layer.running_mean.view(-1, 1, 1) + layer.running_var.sqrt().view(-1, 1, 1) * torch.randn(4, 64, 32, 32)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 1), layer, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 3)
    )
    before, weight, own = layer.eval()(x).detach(), layer.weight, layer.weight.detach().clone()
    layer.train()
    training = dpfix.make_private_safe(**setting(model, data_loader=images(), norm=norm))
    assert model[1].weight is weight
    error = float((model[1](x).detach() - before).std() / before.std())
    (finding,) = training.report.repairs
    if norm == "folded":
        assert error < 0.05 and model[1].num_groups == 4
        assert "folded into weight and bias" in finding.fix and "must not come from the private data" in finding.fix
    else:
        assert error > 0.2 and torch.equal(weight, own)


def test_fold_is_undone_when_the_call_is_refused() -> None:
    layer = pretrained(nn.BatchNorm2d(8))
    net = Net(layer)
    values = [p.detach().clone() for p in layer.parameters()]
    with pytest.raises(dpfix.DPFixError):
        dpfix.make_private_safe(
            **setting(net, data_loader=images(), norm="folded", criterion=lambda y, t: (y - y.mean(0)).square().sum())
        )
    assert net.norm is layer
    assert all(torch.equal(p, v) for p, v in zip(layer.parameters(), values, strict=True))


def test_nothing_is_folded_where_it_cannot_be() -> None:
    """Two layers with one weight, and one without: said, and the weight is as it was."""
    first, second = pretrained(nn.BatchNorm2d(8)), nn.BatchNorm2d(8)
    second.weight = first.weight
    net = nn.Sequential(
        nn.Conv2d(3, 8, 1), first, second, nn.BatchNorm2d(8, affine=False), nn.Flatten(), nn.Linear(288, 3)
    )
    before = first.weight.detach().clone()
    training = dpfix.make_private_safe(**setting(net, data_loader=images(), norm="folded"))
    assert torch.equal(first.weight, before)
    assert ["not folded" in f.fix for f in training.report.repairs] == [True] * 3

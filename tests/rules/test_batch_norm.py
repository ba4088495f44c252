"""The BatchNorm rule in detail: every kind, every alias, every option."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dpfix
from dpfix.rules.batch_norm import group_count
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


class Scaled(nn.BatchNorm2d):
    """A subclass that computes something else."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_subclass_without_forward_is_replaced() -> None:
    net, _ = make(Plain(8))
    assert type(net.norm) is nn.GroupNorm


def test_subclass_with_forward_is_refused_by_name() -> None:
    with pytest.raises(dpfix.ModelError, match=r"Scaled at `norm`[\s\S]*forward of its own") as refusal:
        make(Scaled(8))
    assert "test_batch_norm.py" in str(refusal.value)


def test_frozen_in_eval_stays() -> None:
    norm = nn.BatchNorm2d(8).requires_grad_(False).eval()
    net, training = make(norm)
    assert net.norm is norm
    assert training.plan.fixed_norms == ("norm",)


def test_frozen_in_training_mode_is_replaced() -> None:
    net, _ = make(nn.BatchNorm2d(8).requires_grad_(False))
    assert type(net.norm) is nn.GroupNorm
    assert not net.norm.weight.requires_grad


def test_root_is_refused_with_a_way_out() -> None:
    data = DataLoader(TensorDataset(torch.randn(12, 6), torch.arange(12) % 3), batch_size=4)
    with pytest.raises(dpfix.ModelError, match=r"DPF001.*root module"):
        dpfix.make_private_safe(**setting(nn.BatchNorm1d(6), data_loader=data))


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


class Activated(nn.BatchNorm2d):
    """As in timm: the parts that follow are children of the layer."""

    def __init__(self, channels: int, factor: float = 1.0) -> None:
        super().__init__(channels)
        self.drop, self.act, self.factor = nn.Identity(), nn.SiLU(), factor

    def forward(self, input: Tensor) -> Tensor:
        return self.factor * self.act(self.drop(super().forward(input)))


@pytest.mark.parametrize("norm", ["group", "instance", "layer"])
def test_a_subclass_that_ends_in_its_parts_keeps_them(norm: str) -> None:
    layer = Activated(8)
    keys = [k for k in nn.Sequential(layer).state_dict() if "running" not in k and "tracked" not in k]
    net, _ = make(layer, norm=norm)
    assert net.norm.act is layer.act and net.norm.weight is layer.weight
    assert list(nn.Sequential(net.norm).state_dict()) == keys
    x = torch.randn(2, 8, 5, 5)
    plain = nn.GroupNorm({"group": 4, "instance": 8, "layer": 1}[norm], 8)
    assert torch.allclose(net.norm(x), nn.functional.silu(plain(x)), atol=1e-5)


def test_a_subclass_that_computes_anything_else_is_refused() -> None:
    with pytest.raises(dpfix.ModelError, match="Activated has a forward of its own"):
        make(Activated(8, factor=2.0))

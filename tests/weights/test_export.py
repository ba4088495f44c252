"""A privately trained model goes back to the architecture, the classes and the keys it was built with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.networks.nets import ResNet, ViT, VNet
from opacus.layers import DPGRU, DPMultiheadAttention
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dpfix
from dpfix.api import options_of
from dpfix.repair.surgery import Surgery
from dpfix.rules.replaceable import Replaceable
from dpfix.rules.rule import run_rules
from dpfix.scan.scan import Scan
from tests.cases import Attention, Recurrent
from tests.helpers import setting, sgd, train


class Nested(nn.Module):
    """Transformer layers two containers deep, with dropout, under a head."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.body = nn.ModuleDict({"inner": nn.ModuleDict({"encoder": encoder})})
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body["inner"]["encoder"](x).mean(1))


def resnet() -> nn.Module:
    return ResNet("basic", [1, 1, 1, 1], [4, 4, 8, 8], spatial_dims=2, n_input_channels=1, num_classes=3)


def vit() -> nn.Module:
    vit = ViT(1, (8, 8), (4, 4), hidden_size=8, mlp_dim=16, num_layers=2, num_heads=2, spatial_dims=2)
    return nn.Sequential(vit, First(), nn.Linear(8, 3))


class First(nn.Module):
    """The class token of MONAI's ViT."""

    def forward(self, output: Any) -> Tensor:
        return output[0].mean(1)


def vnet() -> nn.Module:
    return nn.Sequential(VNet(spatial_dims=2, in_channels=1, out_channels=3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@dataclass(frozen=True)
class Trip:
    """A model, the shape of a sample, the engine, and whether a repair changes the model."""

    name: str
    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    mode: str
    changed: bool = False

    def data(self) -> DataLoader[Any]:
        draw = torch.Generator().manual_seed(1)
        x = torch.randn(8, *self.shape, generator=draw)
        return DataLoader(TensorDataset(x, torch.arange(8) % 3), batch_size=4)


TRIPS = (
    Trip("transformer", Nested, (5, 8), "microbatch"),
    Trip("attention, one head", lambda: Attention(batch_first=True, heads=1), (5, 4), "hooks"),
    Trip("LSTM", lambda: Recurrent(nn.LSTM(4, 5, batch_first=True), 5), (5, 4), "microbatch"),
    Trip(
        "LSTM in hooks", lambda: Recurrent(nn.LSTM(4, 5, 2, batch_first=True, bidirectional=True), 10), (5, 4), "hooks"
    ),
    Trip("GRU", lambda: Recurrent(nn.GRU(4, 5, batch_first=True), 5), (5, 4), "microbatch"),
    Trip("GRU in hooks", lambda: Recurrent(nn.GRU(4, 5, batch_first=True), 5), (5, 4), "hooks"),
    Trip("VNet", vnet, (1, 16, 16), "bookkeeping", changed=True),
    Trip("ResNet", resnet, (1, 16, 16), "bookkeeping", changed=True),
    Trip("ViT", vit, (1, 8, 8), "auto"),
)


BOTH_WAYS = [(trip, wrap) for trip in TRIPS for wrap in (True, False) if not (wrap and trip.changed)]


@pytest.mark.parametrize(
    ("trip", "wrap"), BOTH_WAYS, ids=[f"{t.name}, {'' if w else 'not '}wrapped" for t, w in BOTH_WAYS]
)
def test_round_trip(trip: Trip, wrap: bool) -> None:
    torch.manual_seed(0)
    model = trip.model()
    original = copy.deepcopy(model)
    loader = trip.data()
    training = dpfix.make_private_safe(
        **setting(model, data_loader=loader, grad_sample_mode=trip.mode, wrap_model=wrap, poisson_sampling=False)
    )
    looping = training[0] if wrap else model
    train((looping, *training[1:]), steps=2)
    before = original.state_dict()
    assert any(k in before and not torch.equal(p, before[k]) for k, p in model.named_parameters())
    given = next(iter(loader))[0]
    if trip.changed:
        with pytest.warns(dpfix.DPFixWarning, match=r"layers stay as they were repaired.*BatchNorm2d -> GroupNorm"):
            exported = dpfix.export_plain(training[0])
        assert set(dpfix.changed_layers(training[0])) == {
            path for path, m in original.named_modules() if isinstance(m, nn.BatchNorm2d)
        }
    else:
        exported = dpfix.export_plain(training[0])
        assert dpfix.changed_layers(training[0]) == {}
        original.load_state_dict(dpfix.plain_state_dict(training[0]), strict=True)
        report = dpfix.verify_equivalence(training[0], original, given, modes=("eval",), mapping={"": ""}, rtol=0)
        assert report, str(report)
        assert [type(m) for m in exported.modules()] == [type(m) for m in original.modules()]
    report = dpfix.verify_equivalence(training[0], exported, given, modes=("eval",), mapping={"": ""}, rtol=0)
    assert report, str(report)
    assert not any("opacus" in type(m).__module__ or "dpfix" in type(m).__module__ for m in exported.modules())


def test_the_export_shares_nothing_with_the_training() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.ELU(inplace=True), nn.Linear(4, 3))
    training = dpfix.make_private_safe(**setting(model, grad_sample_mode="bookkeeping"))
    exported = dpfix.export_plain(training[0])
    before = copy.deepcopy(exported.state_dict())
    assert exported[1].inplace is True and model[1].inplace is False
    assert "forward" not in vars(exported) and not exported._forward_hooks
    train(training, steps=2)
    assert all(torch.equal(v, before[k]) for k, v in exported.state_dict().items())
    assert not any(hasattr(p, "grad_sample") or hasattr(p, "summed_grad") for p in exported.parameters())
    exported(torch.randn(2, 6)).sum().backward()


def test_parameters_frozen_for_the_training_are_trainable_again() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused, self.fixed = nn.Linear(6, 3), nn.Linear(6, 3), nn.Linear(3, 3)
            self.fixed.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.fixed(self.used(x))

    model = Unused()
    training = dpfix.make_private_safe(**setting(model))
    assert not model.unused.weight.requires_grad
    exported = dpfix.export_plain(training[0])
    assert exported.unused.weight.requires_grad and not exported.fixed.weight.requires_grad


def test_layers_registered_twice_stay_one() -> None:
    rnn = nn.GRU(4, 4, batch_first=True)
    model: Any = nn.ModuleDict({"rnn": rnn, "also": nn.ModuleList([rnn])})
    original = copy.deepcopy(model)
    optimizer, loader = sgd(model), DataLoader(TensorDataset(torch.zeros(8, 5, 4)), batch_size=4)
    scan = Scan(model, optimizer, loader, *options_of({"grad_sample_mode": "hooks"}))
    with Surgery(scan) as surgery:
        surgery.repair(run_rules(scan, [Replaceable("DPF007")]))
        assert type(model["rnn"]) is DPGRU and model["rnn"] is model["also"][0]
        exported: Any = dpfix.export_plain(model)
        assert type(exported["rnn"]) is nn.GRU and exported["rnn"] is exported["also"][0]
        original.load_state_dict(exported.state_dict(), strict=True)
    assert model["rnn"] is rnn and not dpfix.changed_layers(model)


def test_the_root_and_other_objects() -> None:
    linear = nn.Linear(6, 3)
    assert dpfix.plain_state_dict(nn.DataParallel(linear)).keys() == {"weight", "bias"}
    with pytest.raises(dpfix.ArgumentError, match="model is a list, not a"):
        dpfix.export_plain([linear])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["weights", "weights.pt", "weights.safetensors"])
def test_files_load_into_the_original(name: str, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    model = Recurrent(nn.GRU(4, 5, batch_first=True), 5)
    original = copy.deepcopy(model)
    loader = DataLoader(TensorDataset(torch.randn(8, 5, 4), torch.arange(8) % 3), batch_size=4)
    training = dpfix.make_private_safe(**setting(model, data_loader=loader, grad_sample_mode="hooks"))
    train(training, steps=1)
    file = dpfix.save_plain(training[0], tmp_path / name)
    assert file.suffix == (".pt" if name == "weights.pt" else ".safetensors")
    dpfix.load_pretrained(original, file)
    assert dpfix.verify_equivalence(original, training[0], torch.randn(3, 5, 4), mapping={"": ""})


# ------------------------------------------------------------------ loading into a repaired model


@pytest.mark.parametrize("layer", [lambda: nn.GRU(4, 5, batch_first=True), lambda: nn.LSTM(4, 5, 2, batch_first=True)])
def test_weights_load_into_replaced_layers(layer: Callable[[], nn.Module]) -> None:
    source, model = (Recurrent(layer(), 5) for _ in range(2))
    loader = DataLoader(TensorDataset(torch.randn(8, 5, 4), torch.arange(8) % 3), batch_size=4)
    training = dpfix.make_private_safe(**setting(model, data_loader=loader, grad_sample_mode="hooks"))
    report = dpfix.load_pretrained(training[0], source.state_dict())
    assert len(report.loaded) == len(source.state_dict())
    assert dpfix.verify_equivalence(source, training[0], torch.randn(3, 5, 4), mapping={"": ""})
    train(training, steps=1)


@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"add_bias_kv": True, "batch_first": False}, {"kdim": 3, "vdim": 2}]
)
def test_weights_load_into_replaced_attention_of_every_layout(options: dict[str, Any]) -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 1, **({"batch_first": True} | options))})
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            attention: Any = self.inner["attention"]
            x = x if attention.batch_first else x.transpose(0, 1)
            out = attention(x, x[..., : attention.kdim], x[..., : attention.vdim])[0]
            return self.head(out.mean(1 if attention.batch_first else 0))

    source, model = Attending(), Attending()
    x = torch.randn(3, 5, 4)
    scan = Scan(
        model, sgd(model), DataLoader(TensorDataset(x), batch_size=3), *options_of({"grad_sample_mode": "hooks"})
    )
    with Surgery(scan) as surgery:
        surgery.repair(run_rules(scan, [Replaceable("DPF007")]))
        assert type(model.inner["attention"]) is DPMultiheadAttention
        assert len(dpfix.load_pretrained(model, source.state_dict()).loaded) == len(source.state_dict())
        assert dpfix.verify_equivalence(source, model, x, mapping={"": ""})
        for p in model.parameters():
            p.data += 0.1
        assert not dpfix.verify_equivalence(source, model, x, mapping={"": ""})
        source.load_state_dict(dpfix.plain_state_dict(model), strict=True)
        assert dpfix.verify_equivalence(source, model, x, mapping={"": ""})


def test_running_statistics_of_a_repaired_norm_are_left_out_by_name() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 3))

    source, model = build(), build()
    loader = DataLoader(TensorDataset(torch.randn(8, 1, 8, 8), torch.arange(8) % 3), batch_size=4)
    training = dpfix.make_private_safe(**setting(model, data_loader=loader))
    report = dpfix.load_pretrained(training[0], source.state_dict())
    assert set(report.dropped) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert "BatchNorm2d -> GroupNorm" in report.dropped["1.running_mean"]
    assert torch.equal(model[1].weight, source[1].weight)
    with pytest.raises(dpfix.UnusedKeysError, match=r"2.scale"):
        dpfix.load_pretrained(training[0], dict(source.state_dict()) | {"2.scale": torch.ones(1)})

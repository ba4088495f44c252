"""An activation of probabilities is named, with both places; a net and a loss that belong together are not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import dpfix
from dpfix.observe import double_activation
from dpfix.report.finding import Finding, Severity
from tests.helpers import setting

pytest.importorskip("monai")
from monai.losses import (
    DiceCELoss,
    DiceFocalLoss,
    DiceLoss,
    FocalLoss,
    GeneralizedDiceLoss,
    TverskyLoss,
)
from monai.networks import nets

Loss = Callable[[Tensor, Tensor], Tensor]

SIGMOID: dict[str, Loss] = {
    "BCEWithLogits": nn.BCEWithLogitsLoss(),
    "Dice": DiceLoss(sigmoid=True),
    "Tversky": TverskyLoss(sigmoid=True),
    "GeneralizedDice": GeneralizedDiceLoss(sigmoid=True),
    "DiceFocal": DiceFocalLoss(sigmoid=True),
    "Focal": FocalLoss(),
}
SOFTMAX: dict[str, Loss] = {
    "CrossEntropy": nn.CrossEntropyLoss(),
    "DiceCE": DiceCELoss(softmax=True),
}
LOSSES = SIGMOID | SOFTMAX


def net(last: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1), last)


def arguments(model: nn.Module, loss: Loss | None = None, **changes: Any) -> dict[str, Any]:
    target = F.one_hot(torch.randint(0, 3, (8, 8, 8)), 3).movedim(-1, 1).float()
    loader = DataLoader(TensorDataset(torch.randn(8, 1, 8, 8), target), batch_size=4)
    return setting(model, data_loader=loader, criterion=loss, **changes)


def found(given: dict[str, Any]) -> list[Finding]:
    del given["noise_multiplier"], given["max_grad_norm"]
    report = dpfix.diagnose(**given)
    assert not report.refusals, report
    return [f for f in report.findings if f.code == "DPF030"]


@pytest.mark.parametrize("name", LOSSES)
def test_loss_that_expects_logits_on_probabilities(name: str) -> None:
    last = nn.Sigmoid() if name in SIGMOID else nn.Softmax(1)
    first, *_ = found(arguments(net(last), LOSSES[name]))
    assert first.severity is Severity.BLOCKS_TRAINING
    assert first.path == "3" and "in `3`" in first.fact and "outside the model" in first.fact
    assert ".py:" in first.fact and "place unknown" not in first.fact


@pytest.mark.parametrize("name", LOSSES)
def test_same_loss_on_logits(name: str) -> None:
    assert found(arguments(net(nn.Identity()), LOSSES[name])) == []


NATURAL: dict[str, tuple[Callable[[], nn.Module], Loss]] = {
    "sigmoid and BCELoss": (nn.Sigmoid, nn.BCELoss()),
    "sigmoid and Dice": (nn.Sigmoid, DiceLoss()),
    "softmax and NLL of the log": (lambda: nn.Softmax(1), lambda p, y: F.nll_loss(p.log(), y.argmax(1))),
    "log-softmax and NLL": (lambda: nn.LogSoftmax(1), lambda p, y: F.nll_loss(p, y.argmax(1))),
    "log-softmax and CrossEntropy": (lambda: nn.LogSoftmax(1), nn.CrossEntropyLoss()),
    "tanh and BCEWithLogits": (nn.Tanh, nn.BCEWithLogitsLoss()),
    "sharpened around one half": (nn.Sigmoid, lambda p, y: F.binary_cross_entropy(torch.sigmoid((p - 0.5) * 50), y)),
}


@pytest.mark.parametrize("name", NATURAL)
def test_what_belongs_together(name: str) -> None:
    last, loss = NATURAL[name]
    assert found(arguments(net(last()), loss)) == []


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda p: p.flatten(2).reshape(p.shape),
    "cast": lambda p: p.double().float(),
    "crop": lambda p: p[..., :, :].clone(),
    "mean of two heads": lambda p: torch.stack([p, p * 1.0]).mean(0),
    "sum of two heads": lambda p: (p + p.clone()) / 2,
    "temperature": lambda p: p / 0.5,
    "clamped": lambda p: p.clamp(1e-6, 1 - 1e-6),
    "complement": lambda p: 1 - p,
    "class weights": lambda p: p * torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1),
    "upsampled": lambda p: F.interpolate(F.avg_pool2d(p, 2), scale_factor=2, mode="bilinear"),
}


@pytest.mark.parametrize("way", WAYS)
def test_views_means_and_scalings_in_between(way: str) -> None:
    def loss(p: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(WAYS[way](p), y)

    assert len(found(arguments(net(nn.Sigmoid()), loss))) == 1


OTHER: dict[str, Callable[[Tensor], Tensor]] = {
    "logit": torch.logit,
    "log": lambda p: p.log(),
    "product with an image": lambda p: p * torch.ones(p.shape),
    "bias": lambda p: p - torch.ones(p.shape),
    "gate": lambda p: p * p.tanh(),
}


@pytest.mark.parametrize("way", OTHER)
def test_anything_else_in_between(way: str) -> None:
    def loss(p: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(OTHER[way](p), y)

    assert found(arguments(net(nn.Sigmoid()), loss)) == []


def test_twice_in_the_model_is_advice() -> None:
    (finding,) = found(arguments(nn.Sequential(net(nn.Sigmoid()), nn.Softmax(1)), nn.MSELoss()))
    assert finding.severity is Severity.ADVICE
    assert finding.path == "1" and "in `0.3`" in finding.fact


def test_probabilities_made_and_undone_outside_the_model() -> None:
    """``criterion(torch.sigmoid(model(x)), y)`` with a criterion that applies one."""
    (finding,) = found(arguments(net(nn.Identity()), lambda z, y: DiceLoss(sigmoid=True)(z.sigmoid(), y)))
    assert finding.severity is Severity.BLOCKS_TRAINING and finding.fact.count("outside the model") == 2


def test_per_sample_loss_is_looked_through() -> None:
    assert len(found(arguments(net(nn.Sigmoid()), dpfix.PerSampleLoss(DiceLoss(sigmoid=True))))) == 1


class Checkpointed(nn.Module):
    """Attention with activation checkpointing; its scores are scaled products."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.qk = net(nn.Identity()), nn.Linear(3, 6)

    def attend(self, z: Tensor) -> Tensor:
        tokens = z.flatten(2).transpose(1, 2)
        q, k = self.qk(tokens).chunk(2, -1)
        return (q @ k.transpose(1, 2) * 3**-0.5).softmax(-1) @ tokens

    def forward(self, x: Tensor) -> Tensor:
        z = self.net(x)
        out = checkpoint(self.attend, z, use_reentrant=False)
        assert isinstance(out, Tensor)
        return out.transpose(1, 2).reshape(z.shape)


def test_attention_with_checkpointing() -> None:
    assert found(arguments(Checkpointed(), nn.CrossEntropyLoss())) == []


def test_call_warns_once_and_trains() -> None:
    with pytest.warns(dpfix.DPFixWarning, match=r"DPF030[\s\S]*logits"):
        training = dpfix.make_private_safe(**arguments(net(nn.Sigmoid()), nn.BCEWithLogitsLoss()))
    assert "DPF030" in str(training.report)


small = partial(dict, spatial_dims=2, in_channels=1, out_channels=3)
ZOO: dict[str, Callable[[], nn.Module]] = {
    "UNet": lambda: nets.UNet(**small(), channels=(4, 8), strides=(2,)),
    "AttentionUnet": lambda: nets.AttentionUnet(**small(), channels=(4, 8), strides=(2,)),
    "SegResNet": lambda: nets.SegResNet(**small(), init_filters=8, blocks_down=(1, 1), blocks_up=(1,)),
    "DynUNet": lambda: nets.DynUNet(
        **small(), kernel_size=[3] * 3, strides=[1, 2, 2], upsample_kernel_size=[2, 2], filters=[4, 8, 8]
    ),
    "UNETR": lambda: nets.UNETR(
        1, 3, (16, 16), feature_size=4, hidden_size=24, mlp_dim=32, num_heads=2, spatial_dims=2
    ),
    "VNet": lambda: nets.VNet(**small()),
    "BasicUNetPlusPlus": lambda: FirstOf(nets.BasicUNetPlusPlus(**small(), features=(4, 4, 4, 4, 4, 4))),
    "SwinUNETR": lambda: nets.SwinUNETR(
        in_channels=1, out_channels=3, feature_size=12, spatial_dims=2, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1)
    ),
}


class FirstOf(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]


CLASSIFIERS: dict[str, Callable[[], nn.Module]] = {
    "SEResNet": lambda: nets.SEResNet50(spatial_dims=2, in_channels=1, num_classes=2, layers=(1, 1, 1, 1)),
    "EfficientNet": lambda: nets.EfficientNetBN("efficientnet-b0", pretrained=False, in_channels=1, num_classes=2),
    "ViT": lambda: FirstOf(
        nets.ViT(
            1,
            (16, 16),
            (8, 8),
            hidden_size=24,
            mlp_dim=32,
            num_heads=2,
            spatial_dims=2,
            classification=True,
            num_classes=2,
            post_activation="",
        )
    ),
    "DenseNet": lambda: nets.DenseNet(2, 1, 2, init_features=8, growth_rate=4, block_config=(2, 2)),
}


@pytest.mark.parametrize("name", ZOO | CLASSIFIERS)
def test_networks_with_their_natural_loss(name: str) -> None:
    """Attention, gates, squeeze-excitation and SiLU inside are no alarm."""
    size = {"BasicUNetPlusPlus": 32, "VNet": 32, "SwinUNETR": 64, "EfficientNet": 64}.get(name, 16)
    x = torch.randn(2, 1, size, size)
    if name in ZOO:
        loss = DiceCELoss(softmax=True)(ZOO[name]()(x), F.one_hot(x.long().clamp(0, 2)[:, 0], 3).movedim(-1, 1))
    else:
        loss = F.cross_entropy(CLASSIFIERS[name]()(x), torch.tensor([0, 1]))
    assert double_activation.repeated(loss, double_activation.Calls()) == ()

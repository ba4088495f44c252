"""MONAI's networks straight from their constructors, with its loaders; one call changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dpfix
from dpfix.report.finding import Fixability

pytest.importorskip("monai")
from monai.data import CacheDataset, MetaTensor
from monai.data import DataLoader as MonaiDataLoader
from monai.losses import DiceCELoss
from monai.networks import nets

SIZE = {"BasicUNet": 32}  # it halves its input four times and normalises what is left per channel


def small(cls: type[nn.Module], **options: Any) -> Callable[[], nn.Module]:
    return lambda: cls(spatial_dims=3, in_channels=1, out_channels=2, **options)


NETS: dict[str, Callable[[], nn.Module]] = {
    "VNet": small(nets.VNet),
    "BasicUNet": small(nets.BasicUNet, features=(4, 4, 8, 8, 8, 4)),
    "SegResNet": small(nets.SegResNet, init_filters=8, blocks_down=(1, 1), blocks_up=(1,)),
    "DynUNet": small(
        nets.DynUNet, kernel_size=[3, 3, 3], strides=[1, 2, 2], upsample_kernel_size=[2, 2], filters=[4, 8, 8]
    ),
    "UNet": small(nets.UNet, channels=(4, 8, 8), strides=(2, 2), num_res_units=1),
    "AttentionUnet": small(nets.AttentionUnet, channels=(4, 8, 8), strides=(2, 2)),
}


def patches(number: int, size: int = 16) -> list[dict[str, Any]]:
    shape = (1, size, size, size)
    return [{"image": MetaTensor(torch.rand(shape)), "label": torch.randint(0, 2, shape)} for _ in range(number)]


def criterion() -> Callable[[Tensor, Tensor], Tensor]:
    return DiceCELoss(to_onehot_y=True, softmax=True)


def train(model: nn.Module, optimizer: Any, loader: Any, loss: Callable[[Tensor, Tensor], Tensor]) -> int:
    """A MONAI loop that knows nothing of privacy."""
    model.train()
    steps = 0
    for batch in loader:
        optimizer.zero_grad()
        loss(model(batch["image"]), batch["label"]).backward()
        optimizer.step()
        steps += 1
    return steps


@pytest.mark.parametrize("name", NETS)
def test_network_trains_in_one_call(name: str) -> None:
    model, loss = NETS[name](), criterion()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    loader = MonaiDataLoader(patches(6, SIZE.get(name, 16)), batch_size=2)
    training = dpfix.make_private_safe(
        module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0, criterion=loss
    )
    before = [p.detach().clone() for p in model.parameters()]
    assert train(*training, loss) == 3
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    moved = {n for (n, p), b in zip(model.named_parameters(), before, strict=True) if not torch.equal(p, b)}
    assert moved == trainable
    assert training.statement(1e-2).steps == 3
    assert next(e for e in training.report.evidence if e.engine == training.plan.engine).passed
    assert not any(isinstance(m, nn.BatchNorm3d) for m in model.modules())
    if name == "VNet":
        changes = {f.code: f.fixability for f in training.report.repairs}
        assert changes["DPF001"] is Fixability.CHANGES_MODEL and changes["DPF003"] is Fixability.EXACT


@pytest.mark.parametrize("workers", [0, 2])
def test_cache_dataset(workers: int) -> None:
    data = CacheDataset(patches(8), transform=lambda item: item, progress=False, num_workers=1)
    model, loss = NETS["UNet"](), criterion()
    training = dpfix.make_private_safe(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=MonaiDataLoader(data, batch_size=2, shuffle=True, num_workers=workers),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        criterion=loss,
    )
    assert training[2].dataset is data
    assert train(*training, loss) == 4
    assert all(type(batch["image"]) is MetaTensor for batch in training[2] if len(batch["image"]))


@pytest.mark.parametrize("options", [{"batch": True}], ids=["batch-dice"])
def test_batch_dice_is_refused_with_a_way_out(options: dict[str, Any]) -> None:
    model = NETS["UNet"]()
    with pytest.raises(dpfix.CoupledLossError, match=r"DPF014[\s\S]*help"):
        dpfix.make_private_safe(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=MonaiDataLoader(patches(6), batch_size=2),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            criterion=DiceCELoss(to_onehot_y=True, softmax=True, **options),
        )


def test_an_empty_patch_behind_instance_norms_is_no_coupling() -> None:
    """Each norm divides the rounding errors of a constant patch by nearly nothing; that is nobody else's doing."""
    model = nets.UNet(3, 1, 2, (16, 32, 64), (2, 2))
    data = TensorDataset(torch.randn(6, 1, 32, 32, 32), torch.randint(0, 2, (6, 32, 32, 32)))
    private = dpfix.make_private_safe(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(data, batch_size=4),
        criterion=torch.nn.functional.cross_entropy,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    assert private.plan.engine

"""Regions and labels, Dice per case, probabilities of a whole image, and region-based private training with MONAI."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dpfix
from dpfix.segmentation import (
    Regions,
    ensemble_probabilities,
    predict_probabilities,
    region_dice,
    segmentation_from_probabilities,
)
from tests.segmentation.exports import ORDER, REGIONS, truth

pytest.importorskip("monai")
from monai.inferers import SlidingWindowInferer
from monai.losses import DiceLoss
from monai.networks.nets import BasicUNetPlusPlus, UNet
from monai.transforms import Compose, EnsureTyped, Lambdad

TUMOUR = Regions({"whole": (1, 2, 3), "core": (2, 3), "enhancing": (3,)})


def label_map(seed: int = 0, shape: tuple[int, ...] = (16, 16, 16)) -> Tensor:
    return torch.from_numpy(truth(seed, shape))[None]


# ------------------------------------------------------------------ regions


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.uint8])
def test_there_and_back(dtype: torch.dtype) -> None:
    one = label_map().to(dtype)
    regions = TUMOUR.from_labels(one)
    assert regions.shape == (3, 16, 16, 16) and regions.dtype == torch.float32
    assert torch.equal(TUMOUR.to_labels(regions), one.long())
    batch = torch.stack([one, label_map(1).to(dtype)])
    assert torch.equal(TUMOUR.to_labels(TUMOUR.from_labels(batch, dim=1), dim=1), batch.long())


def test_same_label_map_as_ensembling() -> None:
    p = torch.rand(3, 4, 5, 6)
    written = segmentation_from_probabilities(p, regions_class_order=TUMOUR.order)
    assert torch.equal(TUMOUR.to_labels(p)[0].short(), written)


def test_brats_labels() -> None:
    """Labels 1 (necrosis), 2 (edema), 4 (enhancing), with the order that nnU-Net's BraTS data set has."""
    regions = Regions({"whole": (1, 2, 4), "core": (1, 4), "enhancing": (4,)}, order=(2, 1, 4))
    labels = torch.tensor([[0, 1, 2, 4]])
    assert regions.from_labels(labels).tolist() == [[0, 1, 1, 1], [0, 1, 0, 1], [0, 0, 0, 1]]
    assert torch.equal(regions.to_labels(regions.from_labels(labels)), labels)
    assert Regions({"whole": (1, 2, 4), "core": (1, 4), "enhancing": (4,)}).order == (2, 1, 4)


def test_of_an_nnunet_dataset() -> None:
    regions = Regions.from_dataset_json({"labels": REGIONS, "regions_class_order": ORDER})
    assert regions.labels == TUMOUR.labels and regions.order == TUMOUR.order
    with pytest.raises(dpfix.SegmentationError, match="no regions_class_order"):
        Regions.from_dataset_json({"labels": {"background": 0, "tumour": 1}})


@pytest.mark.parametrize(
    ("labels", "order", "message"),
    [
        ({"whole": (0, 1)}, None, "0 is the background"),
        ({"core": (2,), "whole": (1, 2)}, (2, 1), "label 2 comes back as 1.*larger regions first"),
        ({"whole": (1, 2)}, None, r"'whole' = \(1, 2\) has the labels \[1, 2\] to itself"),
        ({"whole": (1,)}, (1, 2), "names 2 labels for 1 regions"),
    ],
)
def test_regions_that_cannot_be_undone(
    labels: dict[str, tuple[int, ...]], order: tuple[int, ...] | None, message: str
) -> None:
    with pytest.raises(dpfix.SegmentationError, match=message):
        Regions(labels, order)


def test_shapes_are_checked() -> None:
    with pytest.raises(dpfix.SegmentationError, match=r"\(3, 4\), and not one channel in dimension 0"):
        TUMOUR.from_labels(torch.zeros(3, 4))
    with pytest.raises(dpfix.SegmentationError, match=r"2 channels .*3 regions \(whole, core, enhancing\)"):
        TUMOUR.to_labels(torch.zeros(2, 4))
    with pytest.raises(dpfix.SegmentationError, match="prediction has shape"):
        region_dice(torch.zeros(2, 3, 4), torch.zeros(2, 3, 5))


def test_dice_per_case() -> None:
    """The value of every case is its own, and nothing in neither is nothing to measure."""
    target = TUMOUR.from_labels(torch.stack([label_map(), label_map(1), torch.zeros_like(label_map())]), dim=1)
    prediction = torch.where(torch.rand(target.shape) < 0.1, 1 - target, target)
    prediction[2] = 0
    both = region_dice(prediction, target)
    assert both.shape == (3, 3) and both[2].isnan().all()
    for case in range(2):
        for region in range(3):
            a, b = (t[case, region].numpy().astype(bool) for t in (prediction, target))
            assert both[case, region].item() == pytest.approx(2 * np.sum(a & b) / (a.sum() + b.sum()))
        assert torch.equal(region_dice(prediction[case : case + 1], target[case : case + 1])[0], both[case])
    assert region_dice(prediction, target, empty=1.0)[2].tolist() == [1, 1, 1]


# ------------------------------------------------------------------ prediction


def unet(last: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(1)
    net = UNet(3, 1, 3, channels=(4, 8), strides=(2,), norm="instance")
    return net if last is None else nn.Sequential(net, last)


@pytest.mark.parametrize("kind", ["regions", "labels"])
def test_whole_image_at_once(kind: str) -> None:
    net, image = unet().train(), torch.randn(2, 1, 16, 16, 16) * 5
    p = predict_probabilities(net, image, kind=kind)
    assert net.training and not p.requires_grad
    with torch.no_grad():
        z = net.eval()(image)
    torch.testing.assert_close(p, z.sigmoid() if kind == "regions" else z.softmax(1))


def test_windows_are_put_together_before_the_activation() -> None:
    net, image = unet(), torch.randn(1, 1, 24, 24, 24) * 5
    inferer = SlidingWindowInferer(16, overlap=0.5, mode="gaussian")
    p = predict_probabilities(net, image, inferer=inferer)
    with torch.no_grad():
        torch.testing.assert_close(p, inferer(image, net.eval()).sigmoid())
    ensemble_probabilities([p[0], p[0]])


def test_a_model_that_ends_in_its_activation() -> None:
    image = torch.randn(1, 1, 16, 16, 16)
    with pytest.raises(dpfix.SegmentationError, match="logits=False"):
        predict_probabilities(unet(nn.Sigmoid()), image)
    once = predict_probabilities(unet(nn.Sigmoid()), image, logits=False)
    torch.testing.assert_close(once, predict_probabilities(unet(), image))
    with pytest.raises(dpfix.SegmentationError, match=r"output 0 of UNet holds values .*logits"):
        predict_probabilities(unet(), image * 5, logits=False)


def test_deep_supervision_gives_its_first_output() -> None:
    net, image = BasicUNetPlusPlus(2, 1, 2, (4, 4, 4, 4, 4, 4)), torch.randn(1, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(predict_probabilities(net, image), net.eval()(image)[0].sigmoid())


# ------------------------------------------------------------------ private training on regions


def test_monai_model_trained_on_regions_and_ensembled() -> None:
    """Transform, per-sample loss, private training, sliding windows, ensemble of members."""
    to_regions = Compose([EnsureTyped(("image", "label")), Lambdad("label", TUMOUR.from_labels)])
    data = [to_regions({"image": torch.randn(1, 16, 16, 16), "label": label_map(i)}) for i in range(6)]
    members = []
    for _ in range(2):
        training = dpfix.make_private_safe(
            module=(net := unet()),
            optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
            data_loader=DataLoader(data, batch_size=3),
            criterion=(loss := DiceLoss(sigmoid=True)),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )
        assert not any(f.code in ("DPF014", "DPF030") for f in training.report.findings)
        model, optimizer, loader = training
        for batch in loader:
            optimizer.zero_grad()
            loss(model(batch["image"]), batch["label"]).backward()
            optimizer.step()
        members.append(predict_probabilities(model, data[0]["image"][None], inferer=SlidingWindowInferer(16))[0])
    p = ensemble_probabilities(members)
    segmentation = segmentation_from_probabilities(p, regions_class_order=TUMOUR.order)
    dice = region_dice(TUMOUR.from_labels(segmentation[None])[None], data[0]["label"][None])
    assert dice.shape == (1, 3) and bool((dice.nan_to_num() <= 1).all())


def test_regions_as_booleans() -> None:
    """nnU-Net's transforms deliver the truth as boolean masks, one per region."""
    target = TUMOUR.from_labels(torch.stack([label_map(i) for i in range(6)]), dim=1).bool()
    training = dpfix.make_private_safe(
        module=(net := unet()),
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(torch.randn(6, 1, 16, 16, 16), target), batch_size=3),
        training_step=lambda model, batch: DiceLoss(sigmoid=True)(model(batch[0]), batch[1].float()),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    assert training.plan.engine

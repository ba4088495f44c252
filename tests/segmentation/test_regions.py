"""Regions and labels, Dice per case, probabilities of a whole image, and region-based private training with MONAI."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dpfix
from dpfix.segmentation import (
    LabelledVoxelsLoss,
    Regions,
    ensemble_probabilities,
    predict_probabilities,
    region_dice,
    segmentation_from_probabilities,
)
from tests.segmentation.exports import ORDER, REGIONS, truth

pytest.importorskip("monai")
from monai.inferers import SlidingWindowInferer
from monai.losses import DiceCELoss, DiceLoss
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
    assert regions.ignore is None and regions.merged == {}
    with pytest.raises(dpfix.SegmentationError, match=r"no regions_class_order, and no regions either.*kind='labels'"):
        Regions.from_dataset_json({"labels": {"background": 0, "tumour": 1}})


@pytest.mark.parametrize(
    ("labels", "order", "message"),
    [
        ({"whole": (0, 1)}, None, "0 is the background"),
        ({"core": (2,), "whole": (1, 2)}, (2, 1), "label 2 comes back as 1.*larger regions first"),
        (
            {"core": (2,), "whole": (1, 2)},
            None,
            "label 2 comes back as 1, .*'whole' writes: 2 is in core, whole, and 1 in whole",
        ),
        ({"left": (1, 3), "right": (2, 3)}, None, "label 3 comes back as 2.*3 is in left, right, and 2 in right"),
        ({"whole": (1,)}, (1, 2), "names 2 labels for 1 regions"),
        ({"whole": (1, 2), "core": (2,)}, (1, 3), "region 'core' writes label 3, which it does not have"),
        ({"whole": (1, 2), "a": (1,), "b": (2,)}, (7, 1, 2), "region 'whole' writes label 7, which it does not have"),
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


# ------------------------------------------------------------------ labels that merge

PED = {"WT": (1, 2, 3, 4), "TC": (1, 2, 3), "ET": (1,)}
"""BraTS-PED: 1 enhancing, 2 non-enhancing, 3 cyst, 4 edema. In these regions 2 and 3 are the same."""
SCHEMES: dict[str, tuple[dict[str, tuple[int, ...]], tuple[int, ...] | None, tuple[int, ...], dict[int, int]]] = {
    "BraTS 2018": ({"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)}, None, (2, 1, 4), {}),
    "BraTS 2021": ({"WT": (1, 2, 3), "TC": (2, 3), "ET": (3,)}, (1, 2, 3), (1, 2, 3), {}),
    "BraTS-PED": (PED, None, (4, 2, 1), {3: 2}),
    "BraTS-PED, cysts written": (PED, (4, 3, 1), (4, 3, 1), {2: 3}),
    "BraTS-PED, labels too": (PED | {"NET": (2,), "CC": (3,), "ED": (4,)}, None, (4, 1, 1, 2, 3, 4), {}),
    "BraTS, whole tumour": ({"WT": (1, 2, 4)}, None, (1,), {2: 1, 4: 1}),
    "KiTS 2023": ({"kidney": (1, 2, 3), "masses": (2, 3), "tumor": (2,)}, (1, 3, 2), (1, 3, 2), {}),
    "KiTS 2021": ({"kidney": (1, 2, 3), "masses": (2, 3), "tumor": (2,)}, None, (1, 3, 2), {}),
    "KiTS, two regions": ({"kidney": (1, 2, 3), "masses": (2, 3)}, None, (1, 2), {3: 2}),
    "labels": ({"liver": (1,), "spleen": (2,), "kidney": (3,)}, None, (1, 2, 3), {}),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_schemes_of_public_data(name: str) -> None:
    labels, given, order, merged = SCHEMES[name]
    regions = Regions(labels, given)
    assert regions.order == order and regions.merged == merged
    there = regions.from_labels(torch.arange(5)[None])
    back = regions.to_labels(there)
    assert torch.equal(regions.from_labels(back), there)
    in_a_region = set().union(*labels.values())
    assert back[0].tolist() == [merged.get(v, v) if v in in_a_region else 0 for v in range(5)]


def test_merging_regions_of_an_nnunet_dataset() -> None:
    labels = {"background": 0, "WT": [1, 2, 3, 4], "TC": [1, 2, 3], "ET": 1}
    regions = Regions.from_dataset_json({"labels": labels, "regions_class_order": [4, 2, 1]})
    assert regions.labels == PED and regions.merged == {3: 2}
    for order in ({}, {"regions_class_order": None}):
        with pytest.raises(
            dpfix.SegmentationError,
            match=r"region 'WT' = \[1, 2, 3, 4\].*no regions_class_order.*\"regions_class_order\": \[4, 2, 1\]",
        ):
            Regions.from_dataset_json({"labels": labels, **order})
    with pytest.raises(dpfix.SegmentationError, match=r"no regions_class_order.*label 2 comes back as 1"):
        Regions.from_dataset_json({"labels": {"background": 0, "TC": [2], "WT": [1, 2]}})
    with pytest.raises(dpfix.SegmentationError, match="labels has '1': 'tumour'"):
        Regions.from_dataset_json({"labels": {"background": 0, "1": "tumour"}, "regions_class_order": [1]})


def maps_of(labels: Iterable[int]) -> Tensor:
    return torch.tensor([[0, *labels]])


@st.composite
def hierarchies(draw: st.DrawFn) -> dict[str, tuple[int, ...]]:
    """Regions that hold each other or are disjoint, larger ones first; some labels have none of their own."""
    numbers = draw(st.lists(st.integers(1, 300), min_size=1, max_size=8, unique=True))
    found: dict[str, tuple[int, ...]] = {}
    todo = [tuple(numbers)]
    while todo:
        inside = todo.pop(0)
        found[f"r{len(found)}"] = inside
        number = draw(st.integers(0, 2))
        of = [draw(st.integers(0, number)) for _ in inside]
        todo += [part for i in range(number) if (part := tuple(v for v, o in zip(inside, of, strict=True) if o == i))]
        if len(found) + len(todo) > 8:
            break
    return found


@given(hierarchies(), st.booleans())
def test_any_hierarchy_comes_back_exactly(labels: dict[str, tuple[int, ...]], with_ignore: bool) -> None:
    ignore = [301] if with_ignore else []
    regions = Regions(labels, ignore=301 if with_ignore else None)
    every = sorted(set().union(*labels.values()))
    there = regions.from_labels(maps_of([*every, *ignore]))
    back = regions.to_labels(there)
    assert torch.equal(regions.from_labels(back), there)
    assert back[0].tolist() == [0, *(regions.merged.get(v, v) for v in every), *ignore]


def written(labels: dict[str, tuple[int, ...]], order: tuple[int, ...], label: int) -> int:
    """What a label comes back as, read off the definition."""
    return ([0] + [w for values, w in zip(labels.values(), order, strict=True) if label in values])[-1]


def exact(labels: dict[str, tuple[int, ...]], order: tuple[int, ...]) -> bool:
    def regions_of(label: int) -> list[str]:
        return [name for name, values in labels.items() if label in values]

    return all(regions_of(v) == regions_of(written(labels, order, v)) for v in set().union(*labels.values()))


@given(st.lists(st.sets(st.integers(1, 4), min_size=1), min_size=1, max_size=3))
def test_refused_is_what_no_order_brings_back(parts: list[set[int]]) -> None:
    """Of any regions, hierarchical or not: what is taken is exact, and what is refused is so in no order."""
    labels = {f"r{i}": tuple(sorted(part)) for i, part in enumerate(parts)}
    possible = [order for order in itertools.product(*labels.values()) if exact(labels, order)]
    try:
        assert Regions(labels).order in possible
    except dpfix.SegmentationError:
        assert not possible
    for order in itertools.islice(itertools.product(*labels.values()), 16):
        try:
            Regions(labels, order)
        except dpfix.SegmentationError:
            assert order not in possible
        else:
            assert order in possible


# ------------------------------------------------------------------ voxels that nobody labelled

UNLABELLED = Regions({"whole": (1, 2, 3), "core": (2, 3), "enhancing": (3,)}, ignore=4)


def test_ignored_voxels_are_no_background() -> None:
    labels = torch.tensor([[0, 1, 2, 3, 4]])
    target = UNLABELLED.from_labels(labels)
    assert target.tolist() == [[0, 1, 1, 1, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]
    assert torch.equal(UNLABELLED.to_labels(target), labels)
    assert UNLABELLED.to_labels(target[:3]).tolist() == [[0, 1, 2, 3, 0]]  # what a model predicts
    dataset = {"labels": REGIONS | {"ignore": 4}, "regions_class_order": ORDER}
    assert torch.equal(Regions.from_dataset_json(dataset).from_labels(labels), target)
    with pytest.raises((AssertionError, ValueError)):  # a loss that does not know of them cannot take it
        DiceLoss(sigmoid=True)(torch.randn(1, 3, 5), target[None])


@pytest.mark.parametrize(("ignore", "message"), [(2, "label 2 is to be ignored.*'core'"), (0, "0 is the background")])
def test_a_label_is_ignored_or_in_a_region(ignore: int, message: str) -> None:
    with pytest.raises(dpfix.SegmentationError, match=message):
        Regions({"core": (1, 2)}, ignore=ignore)


def test_dice_without_ignored_voxels() -> None:
    target = UNLABELLED.from_labels(torch.stack([label_map(), label_map(1)]), dim=1)
    prediction = torch.rand(2, 3, 16, 16, 16)
    ignored = torch.zeros(2, 1, 16, 16, 16)
    ignored[0, :, :5], ignored[1] = 1, 1
    dice = region_dice(prediction, target[:, :3], ignored=ignored)
    torch.testing.assert_close(dice[:1], region_dice(prediction[:1, :, 5:], target[:1, :3, 5:]))
    assert dice[1].isnan().all(), "where nothing is labelled there is nothing to measure"
    with pytest.raises(dpfix.SegmentationError, match=r"ignored has shape \(2, 3, 16, 16, 16\)"):
        region_dice(prediction, target[:, :3], ignored=target[:, :3])


def unlabelled(kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Truth of four samples, the same without what is ignored, and where that is: a part, nothing, all, all but a voxel."""
    full = torch.stack([label_map(i, (8, 8, 8)) for i in range(4)])
    ignored = torch.zeros_like(full, dtype=torch.bool)
    ignored[0, :, 2:], ignored[2] = True, True
    ignored[3] = True
    ignored[3, 0, 4, 4, 4] = False
    labels = torch.where(ignored, 4, full)
    if kind == "regions":
        return UNLABELLED.from_labels(labels, dim=1), TUMOUR.from_labels(full, dim=1), ignored
    return (labels, full, ignored) if kind == "labels" else (labels[:, 0], full[:, 0], ignored)


LOSSES: dict[str, tuple[str, int, Callable[..., Tensor]]] = {
    "Dice": ("regions", 3, DiceLoss(sigmoid=True)),
    "Dice over the batch": ("regions", 3, DiceLoss(sigmoid=True, batch=True)),
    "Dice and cross-entropy": ("labels", 4, DiceCELoss(softmax=True, to_onehot_y=True)),
    "cross-entropy": ("labels without a channel", 4, nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0, 4.0]))),
}


@pytest.mark.parametrize("name", LOSSES)
def test_loss_is_over_the_own_labelled_voxels_of_a_sample(name: str) -> None:
    """The mean of the samples' losses, each of what is left of it alone: written out by hand."""
    kind, channels, criterion = LOSSES[name]
    target, full, ignored = unlabelled(kind)
    loss = LabelledVoxelsLoss(criterion, ignore=None if kind == "regions" else 4)
    output = torch.randn(4, channels, 8, 8, 8, requires_grad=True)
    wanted = []
    for i in (0, 1, 3):
        keep = ~ignored[i, 0]
        wanted.append(criterion(output[i : i + 1, :, keep], full[i : i + 1, ..., keep]))
    value = loss(output, target)
    torch.testing.assert_close(value, sum(wanted) / 4)  # a sample without any labelled voxel has loss 0
    (gradient,) = torch.autograd.grad(value, output)
    assert not gradient[ignored.expand_as(gradient)].any() and bool(torch.isfinite(gradient).all())
    one = [torch.autograd.grad(loss(output[i : i + 1], target[i : i + 1]), output)[0] for i in range(4)]
    torch.testing.assert_close(gradient, sum(one) / 4)


def test_loss_over_labelled_voxels_checks_shapes() -> None:
    loss = LabelledVoxelsLoss(DiceLoss(sigmoid=True))
    with pytest.raises(dpfix.SegmentationError, match=r"\(1, 3, 4, 4\).*\(1, 3, 4, 4\).*ignore="):
        loss(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4))
    with pytest.raises(dpfix.SegmentationError, match=r"one channel"):
        LabelledVoxelsLoss(DiceLoss(), ignore=4)(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4))


@pytest.mark.parametrize("own", [False, True], ids=["mean over the batch", "own voxels"])
def test_private_training_without_ignored_voxels(own: bool) -> None:
    """Over the voxels of the whole batch the samples would share a denominator; that is refused, and this is not."""
    target, _, _ = unlabelled("labels without a channel")
    criterion = LabelledVoxelsLoss(nn.CrossEntropyLoss(), ignore=4) if own else nn.CrossEntropyLoss(ignore_index=4)
    torch.manual_seed(0)
    net = nn.Conv3d(1, 4, 3, padding=1)
    images = torch.randn(4, 1, 8, 8, 8)

    def private(rows: list[int]) -> Tensor:
        model = copy.deepcopy(net)
        training = dpfix.make_private_safe(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
            data_loader=DataLoader(TensorDataset(images[rows], target[rows]), batch_size=len(rows)),
            criterion=criterion,
            noise_multiplier=0.0,
            max_grad_norm=0.01,
            poisson_sampling=False,
        )
        wrapped, optimizer, loader = training
        for x, y in loader:
            optimizer.zero_grad()
            criterion(wrapped(x), y).backward()
            optimizer.step()
        moved = [b - a for a, b in zip(model.parameters(), net.parameters(), strict=True)]
        return torch.cat([m.flatten() for m in moved]).detach() * len(rows)

    if not own:
        with pytest.raises(dpfix.CoupledLossError, match="DPF014"):
            private([0, 1, 2, 3])
        return
    everybody = private([0, 1, 2, 3])
    for left_out in range(4):
        rest = private([i for i in range(4) if i != left_out])
        assert float((everybody - rest).norm()) <= 0.01 * (1 + 1e-4)
    expected = torch.zeros_like(everybody)
    for i in range(4):
        loss = criterion(net(images[i : i + 1]), target[i : i + 1])
        g = torch.cat([p.flatten() for p in torch.autograd.grad(loss, list(net.parameters()))])
        expected += g * min(1.0, 0.01 / max(float(g.norm()), 1e-12))
    torch.testing.assert_close(everybody, expected, rtol=1e-3, atol=1e-6)


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

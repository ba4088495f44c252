"""Several views of a sample: their gradients are averaged, clipped once, counted once."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from monai.data.utils import pad_list_data_collate
from monai.networks.nets import UNet
from monai.transforms import Compose, EnsureTyped, RandFlipd, RandGaussianNoise, RandSpatialCropSamplesd
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import dpfix
from dpfix import AugmentationMultiplicity
from tests.helpers import sgd
from tests.reference import clipped_sum, gradients_one_by_one, norm, relative_error
from tests.sampling.models import (
    OWN,
    SAMPLES,
    Shifted,
    averaged,
    convolutional,
    deliver_again,
    made,
    one_draw,
    pairs,
    released,
    step,
)


@pytest.mark.parametrize(
    ("name", "engine"),
    [(name, engine) for name in ("convolution", "transformer", "unet") for engine in OWN]
    + [("hooked", "hooks"), ("hooked", "functorch")],
)
@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_clipped_sum_is_that_of_averaged_views(name: str, engine: str, k: int, reduction: str) -> None:
    model, data = made(name)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return step(model, batch, reduction)

    plain = copy.deepcopy(model)
    training = dpfix.make_private_safe(
        module=model, optimizer=sgd(model, 0.0),
        **one_draw(data, training_step=loss, loss_reduction=reduction, grad_sample_mode=engine,
                   augmentation=AugmentationMultiplicity(Shifted(), k=k)),
    )  # fmt: skip
    private, optimizer, loader = training
    batch = next(iter(loader))
    assert len(batch[0]) == SAMPLES * k
    wanted = averaged(plain, pairs(batch), [k] * SAMPLES)
    for clip_norm in (0.05 * norm(wanted[0]), norm(wanted[1]), 1e3):
        optimizer.max_grad_norm = clip_norm
        optimizer.zero_grad()
        loss(private, batch).backward()
        optimizer.pre_step()
        found = released(model, optimizer, reduction)
        assert relative_error(found, clipped_sum(wanted, clip_norm)) < 1e-9
        deliver_again(loader, SAMPLES, batch)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"transform": 3}, "transform is int"),
        ({"transform": Shifted(), "k": 0}, "k=0"),
        ({"transform": Shifted(), "k": 2.0}, "k=2.0"),
    ],
)
def test_arguments_are_checked(given: dict[str, Any], words: str) -> None:
    with pytest.raises(dpfix.ArgumentError, match=words):
        AugmentationMultiplicity(**given)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"augmentation": Shifted()}, "augmentation is Shifted"),
        (
            {"augmentation": AugmentationMultiplicity(Shifted()), "poisson_sampling": False},
            "needs poisson_sampling=True",
        ),
    ],
)
def test_calls_are_checked(changes: dict[str, Any], words: str) -> None:
    model, data = made("convolution")
    with pytest.raises(dpfix.ArgumentError, match=words):
        dpfix.make_private_safe(module=model, optimizer=sgd(model), **one_draw(data, **changes))


def test_a_transform_that_fails_is_named() -> None:
    model, data = made("convolution")
    augmentation = AugmentationMultiplicity(lambda x: None, k=2)
    with pytest.raises(dpfix.LoaderError, match=r"returned None.*transform of the augmentation"):
        dpfix.make_private_safe(module=model, optimizer=sgd(model), **one_draw(data, augmentation=augmentation))


# ------------------------------------------------------------------ one sample is one sample


def run(data: Dataset[Any], model: nn.Module, steps: int = 4, **changes: Any) -> Any:
    """A few real steps, with noise and sampling."""
    torch.manual_seed(7)
    training = dpfix.make_private_safe(
        module=model, optimizer=sgd(model, 0.1), noise_multiplier=1.0, max_grad_norm=1.0,
        data_loader=DataLoader(data, batch_size=3, generator=torch.Generator().manual_seed(2)), cache=False,
        seed=3, **{"training_step": step, "grad_sample_mode": "bookkeeping", **changes},
    )  # fmt: skip
    private, optimizer, loader = training
    done = 0
    while done < steps:
        for batch in loader:
            optimizer.zero_grad()
            step(private, batch).backward()
            optimizer.step()
            done += 1
    return training


def test_one_view_is_what_no_augmentation_is() -> None:
    (with_views, data), (without, _) = made("convolution"), made("convolution")
    run(data, with_views, augmentation=AugmentationMultiplicity(lambda x: x, k=1))
    run(data, without)
    for a, b in zip(with_views.parameters(), without.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_loader_of_an_earlier_call_goes_on_delivering_views() -> None:
    model, data = made("convolution")
    first = run(data, model, augmentation=AugmentationMultiplicity(Shifted(), k=3))
    given: dict[str, Any] = {"module": model, "noise_multiplier": 1.0, "max_grad_norm": 1.0, "training_step": step}
    again = dpfix.make_private_safe(**given, optimizer=sgd(model, 0.1), data_loader=first[2])
    assert again.plan.views == 3
    plain, _ = made("convolution")
    report = dpfix.diagnose(module=plain, optimizer=sgd(plain, 0.1), data_loader=first[2], training_step=step)
    assert report.settings["views per sample"] == "3", report
    for batch in again[2]:
        again[1].zero_grad()
        step(again[0], batch).backward()
        again[1].step()
    other = AugmentationMultiplicity(Shifted(), k=2)
    asked_for = dpfix.make_private_safe(**given, optimizer=sgd(model, 0.1), data_loader=again[2], augmentation=other)
    assert asked_for.plan.views == 2


def test_privacy_does_not_depend_on_the_views() -> None:
    (with_views, data), (without, _) = made("convolution"), made("convolution")
    many = run(data, with_views, augmentation=AugmentationMultiplicity(Shifted(), k=8))
    none = run(data, without)
    assert many.get_epsilon(1e-3) == none.get_epsilon(1e-3)
    assert many[1].expected_batch_size == none[1].expected_batch_size == 3
    assert many.statement(1e-3).sampling_rate == none.statement(1e-3).sampling_rate
    assert many.report.settings["views per sample"] == "8"


@pytest.mark.filterwarnings("ignore:.*draw.*of the data_loader were skipped:dpfix.DPFixWarning")
@pytest.mark.parametrize("engine", OWN)
def test_one_person_moves_the_sum_by_at_most_the_clip_norm(engine: str) -> None:
    model, data = made("convolution")
    k, clip_norm = 8, 1e-3  # so small that every sample is clipped
    training = dpfix.make_private_safe(
        module=model, optimizer=sgd(model, 0.0),
        **one_draw(data, max_grad_norm=clip_norm, grad_sample_mode=engine,
                   augmentation=AugmentationMultiplicity(Shifted(), k=k)),
    )  # fmt: skip
    private, optimizer, loader = training
    x, y = next(iter(loader))
    found = []
    for kept in (SAMPLES, SAMPLES - 1):
        deliver_again(loader, kept, (x, y))
        optimizer.zero_grad()
        step(private, (x[: kept * k], y[: kept * k])).backward()
        optimizer.pre_step()
        found.append(released(model, optimizer, "mean"))
    moved = norm({n: g - found[1][n] for n, g in found[0].items()})
    assert moved <= clip_norm * (1 + 1e-6)
    assert moved > 0.99 * clip_norm


@pytest.mark.parametrize("engine", ["bookkeeping", "hooks"])
def test_a_memory_manager_splits_by_samples(engine: str) -> None:
    (small, data), (whole, _) = made("hooked"), made("hooked")
    plain = copy.deepcopy(small)
    sizes = []
    for model, physical in ((small, 2), (whole, SAMPLES)):
        training = dpfix.make_private_safe(
            module=model, optimizer=sgd(model, 1.0),
            **one_draw(data, grad_sample_mode=engine,
                       augmentation=AugmentationMultiplicity(Flipped(), k=2, identity=True)),
        )  # fmt: skip
        private, optimizer, loader = training
        with BatchMemoryManager(data_loader=loader, max_physical_batch_size=physical, optimizer=optimizer) as batches:
            for x, y in batches:
                sizes.append(len(x))
                optimizer.zero_grad()
                step(private, (x, y)).backward()
                optimizer.step()
    assert sizes == [4, 4, 4, 12]
    for (name, a), b, p in zip(small.named_parameters(), whole.parameters(), plain.parameters(), strict=True):
        assert not torch.equal(a, p), name
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


class Flipped:
    """A view that is always the same, so that two runs can be compared."""

    def __call__(self, x: Tensor) -> Tensor:
        return x.flip(-1)


def test_loop_without_criterion_is_followed() -> None:
    model, data = made("convolution")
    training = run(data, model, training_step=None, augmentation=AugmentationMultiplicity(Shifted(), k=3))
    assert training.privacy_engine.accountant.history[0][-1] >= 4


def test_coupled_views_of_different_samples_are_refused() -> None:
    model, data = made("convolution")

    def batch_level(model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(model(x), y) + model(x).var(0).mean()

    with pytest.raises(dpfix.CoupledLossError):
        dpfix.make_private_safe(
            module=model, optimizer=sgd(model),
            **one_draw(data, training_step=batch_level, augmentation=AugmentationMultiplicity(Shifted(), k=2)),
        )  # fmt: skip


def test_consistency_between_views_of_a_sample_is_allowed() -> None:
    """A loss may compare the views of one sample (SimSiam, FixMatch): they are the same person's."""
    torch.manual_seed(0)
    model, data = made("transformer")
    plain = copy.deepcopy(model)

    def consistent(model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        out = model(x)
        first, second = out[0::2], out[1::2]
        return F.cross_entropy(out, y) + (first - second).square().mean()

    training = dpfix.make_private_safe(
        module=model, optimizer=sgd(model, 0.0),
        **one_draw(data, training_step=consistent, augmentation=AugmentationMultiplicity(Shifted(), k=2)),
    )  # fmt: skip
    private, optimizer, loader = training
    x, y = next(iter(loader))
    optimizer.zero_grad()
    consistent(private, (x, y)).backward()
    optimizer.pre_step()
    singles = [(x[2 * i : 2 * i + 2], y[2 * i : 2 * i + 2]) for i in range(SAMPLES)]
    wanted = gradients_one_by_one(plain, consistent, singles)
    assert relative_error(released(model, optimizer, "mean"), clipped_sum(wanted, 1.0)) < 1e-9


# ------------------------------------------------------------------ transforms


class Volumes(Dataset[Any]):
    """Dictionaries with an image and a segmentation of it."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        image = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(index))
        return {"image": image, "label": (image > 0).float()}


def segmentation(model: nn.Module, batch: Any) -> Tensor:
    return F.binary_cross_entropy_with_logits(model(batch["image"]), batch["label"])


def segmenter() -> nn.Module:
    return UNet(spatial_dims=2, in_channels=1, out_channels=1, channels=(4, 8), strides=(2,))


@pytest.mark.parametrize("workers", [0, 2])
def test_monai_dictionary_transforms_change_image_and_label_together(workers: int) -> None:
    model = segmenter()
    flips = Compose([
        RandFlipd(keys=["image", "label"], prob=0.5, spatial_axis=1),
        EnsureTyped(keys=["image", "label"]),
    ])
    training = dpfix.make_private_safe(
        module=model, optimizer=sgd(model, 0.1), noise_multiplier=1.0, max_grad_norm=1.0, training_step=segmentation,
        data_loader=DataLoader(Volumes(), batch_size=4, num_workers=workers),
        augmentation=AugmentationMultiplicity(flips, k=6), cache=False,
    )  # fmt: skip
    private, optimizer, loader = training
    patterns = set()
    for batch in loader:
        image, label = torch.as_tensor(batch["image"]), torch.as_tensor(batch["label"])
        if len(image) > 1:
            assert torch.equal((image > 0).float(), label)
            by_sample = image.view(-1, 6, *image.shape[1:])
            patterns |= {tuple(bool((view == sample[0]).all()) for view in sample) for sample in by_sample}
        optimizer.zero_grad()
        segmentation(private, batch).backward()
        optimizer.step()
    assert len(patterns) > 1  # every sample has flips of its own


def test_workers_draw_different_views() -> None:
    class Zeros(Dataset[Any]):
        def __len__(self) -> int:
            return 16

        def __getitem__(self, index: int) -> Any:
            return torch.zeros(4), torch.tensor(index % 3)

    model = nn.Linear(4, 3)
    training = dpfix.make_private_safe(
        module=model, optimizer=sgd(model), noise_multiplier=1.0, max_grad_norm=1.0, training_step=step,
        data_loader=DataLoader(Zeros(), batch_size=8, num_workers=2),
        augmentation=AugmentationMultiplicity(RandGaussianNoise(prob=1.0), k=2), cache=False,
    )  # fmt: skip
    rows = torch.cat([torch.as_tensor(x) for x, _ in training[2] if len(x) > 2])
    assert len(rows) > 8
    assert len({tuple(row.tolist()) for row in rows}) == len(rows)


def test_checking_does_not_use_up_the_transform_s_random_numbers() -> None:
    noise = RandGaussianNoise(prob=1.0)
    noise.set_random_state(seed=1)
    before = noise.R.get_state()[2]
    model, data = convolutional(), TensorDataset(torch.randn(SAMPLES, 2, 8, 8), torch.arange(SAMPLES) % 3)
    dpfix.make_private_safe(
        module=model, optimizer=sgd(model), **one_draw(data, augmentation=AugmentationMultiplicity(noise, k=2))
    )
    assert noise.R.get_state()[2] == before


def test_crops_of_a_view_are_rows_of_the_sample() -> None:
    model = segmenter()
    crops = RandSpatialCropSamplesd(keys=["image", "label"], roi_size=(4, 4), num_samples=3, random_size=False)
    training = dpfix.make_private_safe(
        module=model, optimizer=sgd(model), noise_multiplier=1.0, max_grad_norm=1.0, training_step=segmentation,
        data_loader=DataLoader(Volumes(), batch_size=4, collate_fn=pad_list_data_collate),
        augmentation=AugmentationMultiplicity(crops, k=2), cache=False,
    )  # fmt: skip
    private, optimizer, loader = training
    for batch in loader:
        drawn = loader.ledger.pending()
        assert len(batch["image"]) == 6 * max(1, drawn)
        optimizer.zero_grad()
        segmentation(private, batch).backward()
        optimizer.step()


def test_views_of_pairs() -> None:
    image, mask = torch.arange(4.0), torch.arange(4)
    flip = AugmentationMultiplicity(lambda x: x.flip(0), k=2, identity=True)
    first, second = flip.views((image, mask))
    assert torch.equal(first[0], image)
    assert torch.equal(second[0], image.flip(0))
    assert torch.equal(second[1], mask)
    both = AugmentationMultiplicity(lambda pair: (pair[0].flip(0), pair[1].flip(0)), k=1, joint=True)
    ((x, y),) = both.views((image, mask))
    assert torch.equal(x, image.flip(0))
    assert torch.equal(y, mask.flip(0))


def test_transform_that_writes_in_place_leaves_the_dataset_alone() -> None:
    item = (torch.zeros(3), 1)
    views = AugmentationMultiplicity(lambda x: x.add_(1), k=2).views(item)
    assert [v[0].tolist() for v in views] == [[1.0] * 3] * 2
    assert item[0].tolist() == [0.0] * 3

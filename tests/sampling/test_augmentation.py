"""Several views or crops of a sample: their gradients are averaged, clipped once, counted once.

The reference takes every row alone by ordinary autograd, averages the rows of a sample, clips and adds up.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from monai.data.utils import list_data_collate, pad_list_data_collate
from monai.networks.nets import UNet
from monai.transforms import Compose, EnsureTyped, RandFlipd, RandGaussianNoise, RandSpatialCropSamplesd
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import dpfix
from dpfix import AugmentationMultiplicity
from tests.helpers import sgd
from tests.reference import Gradients, clipped_sum, norm, relative_error

SAMPLES = 6


class Shifted:
    """A random view: the input plus noise of its own."""

    def __call__(self, x: Tensor) -> Tensor:
        return x + 0.3 * torch.randn_like(x)


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(inplace=True), nn.Conv2d(4, 6, 3, stride=2, bias=False),
        nn.Flatten(), nn.Linear(54, 3),
    )  # fmt: skip


class Encoder(nn.Module):
    """A transformer on tokens, with a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.embed = nn.Linear(4, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.cat([self.token.expand(len(x), -1, -1), self.embed(x)], 1)
        return self.head(self.layer(tokens)[:, 0])


def unet() -> nn.Module:
    return nn.Sequential(
        UNet(spatial_dims=2, in_channels=1, out_channels=2, channels=(4, 8), strides=(2,), num_res_units=1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3),
    )  # fmt: skip


def hooked() -> nn.Module:
    """A model that Opacus's hooks get right."""
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))


MODELS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "hooked": (hooked, (2, 8, 8)),
    "convolution": (convolutional, (2, 8, 8)),
    "transformer": (Encoder, (5, 4)),
    "unet": (unet, (1, 8, 8)),
}


def made(name: str) -> tuple[nn.Module, TensorDataset]:
    torch.manual_seed(0)
    build, shape = MODELS[name]
    data = TensorDataset(torch.randn(SAMPLES, *shape, dtype=torch.float64), torch.randint(0, 3, (SAMPLES,)))
    return build().double(), data


def step(model: nn.Module, batch: Any, reduction: str = "mean") -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x), y, reduction=reduction)


def averaged(model: nn.Module, rows: list[Any], counts: list[int], loss: Any = step) -> list[Gradients]:
    """Per-sample gradients: every row alone, then the mean over the rows of a sample."""
    parameters = dict(model.named_parameters())
    by_row = []
    for row in rows:
        found = torch.autograd.grad(loss(model, row), list(parameters.values()))
        by_row.append(dict(zip(parameters, found, strict=True)))
    out, first = [], 0
    for n in counts:
        mine = by_row[first : first + n]
        out.append({name: torch.stack([g[name] for g in mine]).mean(0) for name in parameters})
        first += n
    return out


def pairs(batch: Any) -> list[Any]:
    x, y = batch
    return [(x[i : i + 1], y[i : i + 1]) for i in range(len(x))]


def one_draw(data: Dataset[Any], **changes: Any) -> dict[str, Any]:
    """Arguments under which every draw holds all samples."""
    return {
        "data_loader": DataLoader(data, batch_size=SAMPLES),
        "noise_multiplier": 0.0,
        "max_grad_norm": 1.0,
        "training_step": step,
        "cache": False,
        **changes,
    }


OWN = ("bookkeeping", "vmap", "microbatch")


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
        loader.ledger.drew(SAMPLES)
        loader.ledger.deliver()


def released(model: nn.Module, optimizer: Any, reduction: str) -> Gradients:
    """The clipped sum, from the gradient that a step without noise would take."""
    scale = optimizer.expected_batch_size if reduction == "mean" else 1
    return {n: p.grad.detach() * scale for n, p in model.named_parameters()}


# ------------------------------------------------------------------ different numbers of rows


class Crops(Dataset[Any]):
    """Patients with different numbers of crops, as MONAI's transforms return them."""

    def __init__(self, shape: tuple[int, ...], counts: list[int]) -> None:
        draw = torch.Generator().manual_seed(1)
        self.items = [
            [
                {"image": torch.randn(*shape, generator=draw, dtype=torch.float64), "label": torch.tensor(i % 3)}
                for _ in range(n)
            ]
            for i, n in enumerate(counts)
        ]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


COUNTS = [1, 3, 2, 4, 1, 2]


def on_crops(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["image"]), batch["label"])


@pytest.mark.parametrize("engine", ["auto", *OWN])
@pytest.mark.parametrize("name", ["convolution", "transformer", "unet"])
def test_samples_may_have_different_numbers_of_rows(name: str, engine: str) -> None:
    build, shape = MODELS[name]
    torch.manual_seed(0)
    model = build().double()
    plain = copy.deepcopy(model)
    data = Crops(shape, COUNTS)
    training = dpfix.make_private_safe(
        module=model, optimizer=sgd(model, 0.0), max_grad_norm=1.0, noise_multiplier=0.0, training_step=on_crops,
        data_loader=DataLoader(data, batch_size=4, collate_fn=list_data_collate, generator=torch.Generator().manual_seed(5)),
        grad_sample_mode=engine, cache=False,
    )  # fmt: skip
    private, optimizer, loader = training
    assert training.plan.row_counter is not None and training.plan.weighted_by_rows
    assert any(f.code == "DPF024" for f in training.report.findings)
    sizes, compared = set(), 0
    for _ in range(4):
        for batch in loader:
            counts = list(loader.ledger.counts)
            sizes.add(tuple(counts))
            rows = [
                {k: v[i : i + 1] for k, v in batch.items() if isinstance(v, Tensor)} for i in range(len(batch["image"]))
            ]
            optimizer.zero_grad()
            on_crops(private, batch).backward()
            optimizer.pre_step()
            if loader.ledger.pending() is None and rows and optimizer.params[0].grad.abs().sum() > 0:
                wanted = averaged(plain, rows, counts, on_crops)
                assert relative_error(released(model, optimizer, "mean"), clipped_sum(wanted, 1.0)) < 1e-9
                compared += 1
    assert len(sizes) > 3
    assert compared > 3


class Bag(nn.Module):
    """Averages the instances of a bag; its inputs are rows, its outputs are bags."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        return self.head(torch.stack([part.mean(0) for part in hidden.split(counts.tolist())]))


class Bags(Dataset[Any]):
    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(1)
        self.x = [torch.randn(n, 4, generator=draw, dtype=torch.float64) for n in COUNTS]

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        return self.x[index], index % 3


def collate_bags(items: list[Any]) -> Any:
    x, y = zip(*items, strict=True)
    return torch.cat(x), torch.tensor([len(part) for part in x]), torch.tensor(y)


def test_bags_of_different_sizes_weigh_the_same() -> None:
    torch.manual_seed(0)
    model = Bag().double()
    plain = copy.deepcopy(model)

    def on_bags(model: nn.Module, batch: Any) -> Tensor:
        x, counts, y = batch
        return F.cross_entropy(model(x, counts), y)

    training = dpfix.make_private_safe(
        module=model, optimizer=sgd(model, 0.0), max_grad_norm=0.3, noise_multiplier=0.0, training_step=on_bags,
        data_loader=DataLoader(Bags(), batch_size=SAMPLES, collate_fn=collate_bags), cache=False,
    )  # fmt: skip
    private, optimizer, loader = training
    assert not training.plan.weighted_by_rows
    batch = next(iter(loader))
    optimizer.zero_grad()
    on_bags(private, batch).backward()
    optimizer.pre_step()
    singles = [collate_bags([Bags()[i]]) for i in range(SAMPLES)]
    parameters = dict(plain.named_parameters())
    wanted = [
        dict(zip(parameters, torch.autograd.grad(on_bags(plain, one), list(parameters.values())), strict=True))
        for one in singles
    ]
    assert relative_error(released(model, optimizer, "mean"), clipped_sum(wanted, 0.3)) < 1e-9


# ------------------------------------------------------------------ refusals


def test_rows_that_vary_need_a_private_loader() -> None:
    model = convolutional().double()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    loader = DataLoader(Crops((2, 8, 8), COUNTS), batch_size=4, collate_fn=list_data_collate)
    with pytest.raises(dpfix.LoaderError, match=r"known for the batches of a private loader only"):
        dpfix.make_private_safe(
            module=model, optimizer=sgd(model), data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0,
            training_step=on_crops, poisson_sampling=False,
        )  # fmt: skip
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())


def test_rows_that_nothing_tells_are_refused() -> None:
    def drop_some(items: list[Any]) -> Any:
        rows = [(x, y) for x, y in items for _ in range(1 + int(y))]
        return torch.stack([x for x, _ in rows]), torch.tensor([y for _, y in rows])

    data = TensorDataset(torch.randn(SAMPLES, 2, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2]))
    model = convolutional()
    with pytest.raises(dpfix.LoaderError, match=r"nothing in what the dataset returns has that many entries"):
        dpfix.make_private_safe(
            module=model, optimizer=sgd(model), data_loader=DataLoader(data, batch_size=4, collate_fn=drop_some),
            noise_multiplier=1.0, max_grad_norm=1.0, training_step=step,
        )  # fmt: skip


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_with_other_rows_than_those_that_were_looked_at_is_refused(workers: int) -> None:
    """With 3 and 1 rows, two samples would be taken for two of 2 rows each, and the first would count twice."""
    data = Crops((2, 8, 8), [2] * 20)
    model = convolutional().double()
    _, optimizer, loader = dpfix.make_private_safe(
        module=model, optimizer=sgd(model), noise_multiplier=1.0, max_grad_norm=1.0, training_step=on_crops,
        data_loader=DataLoader(data, batch_size=10, collate_fn=list_data_collate, num_workers=workers),
    )  # fmt: skip
    for index in range(20):
        data.items[index] = data.items[index] * 2 if index % 2 else data.items[index][:1]
    with pytest.raises(dpfix.LoaderError, match=r"a sample has \d rows, while those .* had 2 each"):
        next(iter(loader))
    with (
        BatchMemoryManager(data_loader=loader, max_physical_batch_size=4, optimizer=optimizer) as small,
        pytest.raises(dpfix.LoaderError, match=r"while those .* had 2 each"),
    ):
        next(iter(small))


def test_a_foreign_batch_of_varying_rows_is_refused() -> None:
    model = convolutional().double()
    data = Crops((2, 8, 8), COUNTS)
    own = DataLoader(data, batch_size=SAMPLES, collate_fn=list_data_collate)
    private, optimizer, loader = dpfix.make_private_safe(
        module=model, optimizer=sgd(model), data_loader=own, noise_multiplier=1.0, max_grad_norm=1.0,
        training_step=on_crops,
    )  # fmt: skip
    with pytest.raises(dpfix.PlanBrokenError, match="Train on the batches of the returned data_loader"):
        on_crops(private, next(iter(own)))
    with (
        BatchMemoryManager(data_loader=loader, max_physical_batch_size=3, optimizer=optimizer) as small,
        pytest.raises(dpfix.PlanBrokenError, match="without a BatchMemoryManager"),
    ):
        on_crops(private, next(iter(small)))


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
        noise_generator=torch.Generator().manual_seed(3), **{"training_step": step, "grad_sample_mode": "bookkeeping", **changes},
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
        loader.ledger.drew(kept)
        loader.ledger.deliver()
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
    parameters = dict(plain.named_parameters())
    wanted = []
    for i in range(SAMPLES):
        loss = consistent(plain, (x[2 * i : 2 * i + 2], y[2 * i : 2 * i + 2]))
        wanted.append(dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True)))
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


# ------------------------------------------------------------------ rows that belong to somebody else


def stacked_crops(items: list[Any]) -> Any:
    return list_data_collate([list(item) for item in items])


def frames(items: list[Any]) -> Any:
    rows = [(frame, label) for video, label in items for frame in video.unbind(1)]
    return {"image": torch.stack([x for x, _ in rows]), "label": torch.tensor([y for _, y in rows])}


def with_history(items: list[Any]) -> Any:
    rows = [(x, y) for _, image, y in items for x in image]
    return {"image": torch.stack([x for x, _ in rows]), "label": torch.tensor([y for _, y in rows])}


def crops_of(counts: list[int]) -> list[Any]:
    return Crops((2, 8, 8), counts).items


def videos_of(counts: list[int]) -> list[Any]:
    return [(torch.randn(2, n, 8, 8).double(), i % 3) for i, n in enumerate(counts)]


def visits_of(counts: list[int], history: list[int]) -> list[Any]:
    return [
        ([0] * h, torch.randn(n, 2, 8, 8).double(), i % 3) for i, (n, h) in enumerate(zip(counts, history, strict=True))
    ]


@pytest.mark.parametrize(
    ("seen", "later", "collate"),
    [
        (crops_of([1] * 4), crops_of([2, 0, 2, 0]), list_data_collate),
        ([tuple(c) for c in crops_of([2] * 4)], [tuple(c) for c in crops_of([1, 3, 1, 3])], stacked_crops),
        (videos_of([2] * 4), videos_of([1, 3, 1, 3]), frames),
        (visits_of([1, 3], [1, 3]), visits_of([3, 1], [1, 3]), with_history),
    ],
    ids=["one row each", "tuples", "second dimension", "two places that agreed"],
)
def test_rows_are_never_given_to_another_sample(seen: list[Any], later: list[Any], collate: Any) -> None:
    """The batch has as many rows as expected, but not from each sample."""
    data = Crops((2, 8, 8), [])
    data.items = seen
    model = convolutional().double()
    _, _, loader = dpfix.make_private_safe(
        module=model, optimizer=sgd(model), noise_multiplier=1.0, max_grad_norm=1.0, training_step=on_crops,
        data_loader=DataLoader(data, batch_size=len(seen), collate_fn=collate), cache=False,
    )  # fmt: skip
    next(iter(loader))
    data.items = later
    with pytest.raises(dpfix.LoaderError, match=r"a sample has \d|whether a sample has 1 or 3 rows"):
        next(iter(loader))


@pytest.mark.parametrize("engine", OWN)
def test_a_sample_without_rows_contributes_nothing(engine: str) -> None:
    torch.manual_seed(0)
    model = convolutional().double()
    plain = copy.deepcopy(model)
    data = Crops((2, 8, 8), COUNTS)
    training = dpfix.make_private_safe(
        module=model, optimizer=sgd(model, 0.0), max_grad_norm=1.0, noise_multiplier=0.0, training_step=on_crops,
        data_loader=DataLoader(data, batch_size=SAMPLES, collate_fn=list_data_collate), grad_sample_mode=engine, cache=False,
    )  # fmt: skip
    private, optimizer, loader = training
    data.items[3] = []
    batch = next(iter(loader))
    optimizer.zero_grad()
    on_crops(private, batch).backward()
    optimizer.pre_step()
    rows = [{k: batch[k][i : i + 1] for k in ("image", "label")} for i in range(len(batch["image"]))]
    wanted = averaged(plain, rows, [n for i, n in enumerate(COUNTS) if i != 3], on_crops)
    assert relative_error(released(model, optimizer, "mean"), clipped_sum(wanted, 1.0)) < 1e-9


def test_rows_that_vary_need_a_known_loss() -> None:
    class Pairs(Crops):
        def __getitem__(self, index: int) -> Any:
            return [(crop["image"], crop["label"]) for crop in self.items[index]]

    def flat(items: list[Any]) -> Any:
        x, y = zip(*[row for item in items for row in item], strict=True)
        return torch.stack(x), torch.stack(y)

    model = convolutional().double()
    with pytest.raises(
        dpfix.TrainingStepError, match=r"as 3, 4, 1, 2 rows.*Pass the loop's criterion or training_step"
    ):
        dpfix.make_private_safe(
            module=model, optimizer=sgd(model), noise_multiplier=1.0, max_grad_norm=1.0,
            data_loader=DataLoader(Pairs((2, 8, 8), COUNTS), batch_size=SAMPLES, collate_fn=flat),
        )  # fmt: skip


@pytest.mark.parametrize("engine", ["bookkeeping", "microbatch"])
def test_a_loss_that_the_model_computes_keeps_its_precision(engine: str) -> None:
    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = convolutional()

        def forward(self, image: Tensor, label: Tensor) -> Tensor:
            return F.cross_entropy(self.net(image), label)

    def inside(model: nn.Module, batch: Any) -> Tensor:
        return model(batch["image"].float(), batch["label"])

    model = WithLoss()
    private, _, loader = dpfix.make_private_safe(
        module=model, optimizer=sgd(model), noise_multiplier=1.0, max_grad_norm=1.0, training_step=inside,
        data_loader=DataLoader(Crops((2, 8, 8), COUNTS), batch_size=SAMPLES, collate_fn=list_data_collate),
        grad_sample_mode=engine, cache=False,
    )  # fmt: skip
    assert inside(private, next(iter(loader))).dtype == torch.float32

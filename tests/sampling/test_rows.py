"""Samples with several rows: crops, bags, frames; each sample counts once, and no row counts as another's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from monai.data.utils import list_data_collate
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import dpfix
from tests.helpers import sgd
from tests.reference import clipped_sum, gradients_one_by_one, relative_error
from tests.sampling.models import (
    COUNTS,
    MODELS,
    OWN,
    SAMPLES,
    Crops,
    averaged,
    convolutional,
    hooked,
    on_crops,
    released,
    step,
)


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
    wanted = gradients_one_by_one(plain, on_bags, singles)
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
    private, _, _ = dpfix.make_private_safe(
        module=model, optimizer=sgd(model), data_loader=own, noise_multiplier=1.0, max_grad_norm=1.0,
        training_step=on_crops,
    )  # fmt: skip
    with pytest.raises(dpfix.PlanBrokenError, match="Train on the batches of the returned data_loader"):
        on_crops(private, next(iter(own)))


@pytest.mark.parametrize("physical", [1, 2, 4])
@pytest.mark.parametrize("engine", OWN)
def test_a_memory_manager_splits_samples_with_different_numbers_of_rows(engine: str, physical: int) -> None:
    torch.manual_seed(0)
    model = convolutional().double()
    plain, data = copy.deepcopy(model), Crops((2, 8, 8), COUNTS)
    private, optimizer, loader = dpfix.make_private_safe(
        module=model, optimizer=sgd(model), noise_multiplier=0.0, max_grad_norm=0.3, training_step=on_crops,
        data_loader=DataLoader(data, batch_size=SAMPLES, collate_fn=list_data_collate), grad_sample_mode=engine, cache=False,
    )  # fmt: skip
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=physical, optimizer=optimizer) as small:
        for batch in small:
            optimizer.zero_grad()
            on_crops(private, batch).backward()
            optimizer.step()
    rows = [list_data_collate([[row]]) for item in data.items for row in item]
    wanted = clipped_sum(averaged(plain, rows, COUNTS, on_crops), 0.3)
    moved = {n: (p - dict(model.named_parameters())[n]).detach() * SAMPLES for n, p in plain.named_parameters()}
    assert relative_error(moved, wanted) < 1e-9


@pytest.mark.parametrize("extra", [2, 1, -1, -2])
@pytest.mark.parametrize("engine", ["bookkeeping", "vmap", "microbatch", "hooks"])
def test_a_part_of_a_sample_is_refused(engine: str, extra: int) -> None:
    """8 rows for two samples of 3 would be taken for two of 4: one row of the first sample would go to the second."""
    model = hooked().double()
    training = dpfix.make_private_safe(
        module=model, optimizer=sgd(model), data_loader=DataLoader(Crops((2, 8, 8), [3] * 6), 2, collate_fn=list_data_collate),
        noise_multiplier=0.0, max_grad_norm=1.0, training_step=on_crops, grad_sample_mode=engine, poisson_sampling=False,
    )  # fmt: skip
    private, optimizer, loader = training
    batch = next(iter(loader))
    rows = torch.arange(6 + extra) % 6
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(dpfix.MisuseError, match=rf"{6 + extra} rows, which are not 3 for (each|every) sample"):
        on_crops(private, {"image": batch["image"][rows], "label": batch["label"][rows]}).backward()
        optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))


def test_a_batch_without_rows_is_refused() -> None:
    model = convolutional().double()
    data = Crops((2, 8, 8), [3] * 6)
    private, _, loader = dpfix.make_private_safe(
        module=model, optimizer=sgd(model), data_loader=DataLoader(data, 2, collate_fn=list_data_collate),
        noise_multiplier=0.0, max_grad_norm=1.0, training_step=on_crops, poisson_sampling=False,
        grad_sample_mode="bookkeeping",
    )  # fmt: skip
    batch = next(iter(loader))
    with pytest.raises(dpfix.ForeignBatchError, match="0 rows, which are not 3 for each sample"):
        on_crops(private, {"image": batch["image"][:0], "label": batch["label"][:0]})


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


class Quiet(nn.Linear):
    """Gradients of all rows are nearly alike: those of the bias are much larger than those of the weight."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(0.003 * x)


def test_rows_weigh_alike_although_their_gradients_are_nearly_alike() -> None:
    model = Quiet(6, 3)
    nn.init.zeros_(model.weight)
    items = [(x, i % 3) for i, x in enumerate(torch.randn(20, 6, generator=torch.Generator().manual_seed(0)))]
    training = dpfix.make_private_safe(
        module=model, optimizer=sgd(model, 0.0), max_grad_norm=1.0, noise_multiplier=1.0, cache=False,
        data_loader=DataLoader(items, batch_size=4), privacy_unit=[i // 2 if i < 8 else 4 + i // 3 for i in range(20)],  # type: ignore[arg-type]
    )  # fmt: skip
    assert training.plan.weighted_by_rows

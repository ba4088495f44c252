"""Poisson sampling as the accountant assumes it, empty draws included."""

from __future__ import annotations

import copy
import warnings
from collections import namedtuple
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from opacus.data_loader import DPDataLoader
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import Tensor, nn
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset, default_collate

import dpfix
from tests.cases import classify
from tests.helpers import points, setting, sgd, train
from tests.reference import clipped_sum, gradients_one_by_one, relative_error

# ------------------------------------------------------------------ rate and index set


def loader(samples: int, **options: Any) -> DataLoader[Any]:
    return DataLoader(points(samples), **options)


LOADERS: dict[str, tuple[Callable[[], DataLoader[Any]], float, int]] = {
    "full-batches": (lambda: loader(40, batch_size=8), 8 / 40, 5),
    "last-batch-short": (lambda: loader(45, batch_size=8), 8 / 45, 6),
    "last-batch-dropped": (lambda: loader(45, batch_size=8, drop_last=True), 8 / 45, 5),
    "93-batches": (lambda: loader(930, batch_size=10, shuffle=True), 10 / 930, 93),
    "subset": (lambda: loader(40, batch_size=4, sampler=SubsetRandomSampler(range(10, 22))), 4 / 12, 3),
    "batch-larger-than-data": (lambda: loader(6, batch_size=64), 1.0, 1),
}


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.filterwarnings("ignore:divide by zero encountered in log:RuntimeWarning")  # Opacus's accountant at rate 1
def test_rate_is_batch_size_over_index_set(name: str) -> None:
    build, rate, steps = LOADERS[name]
    training = dpfix.make_private_safe(**setting(data_loader=build()))
    _, optimizer, private = training
    assert private.sample_rate == rate
    assert len(private) == steps
    assert optimizer.expected_batch_size == min(build().batch_size, len(build().dataset))
    train(training, 1)
    assert training.privacy_engine.accountant.history == [(1.0, rate, 1)]
    statement = training.statement(1e-3)
    assert statement.sampling_rate == rate and 0 < statement.epsilon < 100


def draws(training: dpfix.PrivateTraining, number: int) -> list[list[int]]:
    sampler = training[2].batch_sampler
    found: list[list[int]] = []
    while len(found) < number:
        found += list(sampler)
    return found[:number]


def test_batch_sizes_are_binomial() -> None:
    training = dpfix.make_private_safe(**setting(data_loader=loader(40, batch_size=8)))
    sizes = torch.tensor([len(d) for d in draws(training, 4000)], dtype=torch.float64)
    assert float(sizes.mean()) == pytest.approx(8, abs=5 * (6.4 / 4000) ** 0.5)
    assert float(sizes.var()) == pytest.approx(40 * 0.2 * 0.8, rel=5 * (2 / 4000) ** 0.5)


def test_samples_enter_independently_and_alike() -> None:
    number, samples = 4000, 40
    training = dpfix.make_private_safe(**setting(data_loader=loader(samples, batch_size=8)))
    entered = torch.zeros(number, samples, dtype=torch.float64)
    for row, drawn in zip(entered, draws(training, number), strict=True):
        assert len(set(drawn)) == len(drawn), "at most once"
        row[drawn] = 1
    assert float((entered.mean(0) - 0.2).abs().max()) < 5 * (0.16 / number) ** 0.5
    correlation = torch.corrcoef(entered.T) - torch.eye(samples)
    assert float(correlation.abs().max()) < 5.5 / number**0.5
    previous = torch.corrcoef(torch.stack([entered[1:, 0], entered[:-1, 0]]))[0, 1]
    assert abs(float(previous)) < 5 / number**0.5


def test_only_indices_of_the_subset_are_drawn() -> None:
    subset = [3, 5, 8, 13, 21]
    given = loader(40, batch_size=3, sampler=SubsetRandomSampler(subset))
    training = dpfix.make_private_safe(**setting(data_loader=given))
    assert {i for drawn in draws(training, 200) for i in drawn} == set(subset)


def test_passes_differ_and_follow_the_seed() -> None:
    first, again = (dpfix.make_private_safe(**setting(data_loader=loader(40, batch_size=8), seed=5)) for _ in range(2))
    found = draws(first, 5)
    assert draws(first, 5) != found
    assert draws(again, 5) == found


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_deliver_and_account_every_draw(workers: int) -> None:
    training = dpfix.make_private_safe(**setting(data_loader=loader(24, batch_size=2, num_workers=workers)))
    assert train(training, 24) == 24
    assert sum(entry[-1] for entry in training.privacy_engine.accountant.history) == 24


# ------------------------------------------------------------------ empty draws


def drawing(training: dpfix.PrivateTraining, *drawn: list[int]) -> None:
    """Let the private loader draw these batches."""
    vars(training[2])["batch_sampler"] = list(drawn)


Pair = namedtuple("Pair", ["image", "label"])


class Wide(nn.Module):
    """Enough parameters for a standard deviation, and a forward that dies on an empty batch."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 500), nn.Linear(500, 3)

    def forward(self, x: Any) -> Tensor:
        x = torch.stack([torch.as_tensor(row) for row in x])
        return self.head(self.body(x).relu())


def texts_to_numbers(texts: list[str]) -> Tensor:
    return torch.tensor([[float(len(t)), 1, 0, 0, 0, float(t.count("a"))] for t in texts])


def batch_encoding(items: list[Any]) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.BatchEncoding(default_collate([{"x": x, "y": y} for x, y in items]))


def meta_tensors(samples: int) -> list[Any]:
    data = pytest.importorskip("monai.data")
    return [{"image": data.MetaTensor(x), "label": y} for x, y in points(samples)]


def both(batch: Any) -> tuple[Any, Any]:
    """Inputs and labels of any of the batches."""
    if isinstance(batch, (tuple, list)):
        return batch[0], batch[1]
    return (batch["image"], batch["label"]) if "image" in batch else (batch["x"], batch["y"])


def step(model: nn.Module, batch: Any) -> Tensor:
    x, y = both(batch)
    return F.cross_entropy(model(texts_to_numbers(x) if isinstance(x[0], str) else x), y)


KINDS: dict[str, Callable[[], DataLoader[Any]]] = {
    "tuple": lambda: DataLoader(points(24), batch_size=4),
    "dict": lambda: DataLoader([{"x": x, "y": y} for x, y in points(24)], batch_size=4),
    "namedtuple": lambda: DataLoader([Pair(x, y) for x, y in points(24)], batch_size=4),
    "batch-encoding": lambda: DataLoader(points(24), batch_size=4, collate_fn=batch_encoding),
    "strings": lambda: DataLoader([("a" * i, i % 3) for i in range(24)], batch_size=4),
    "meta-tensor": lambda: DataLoader(meta_tensors(24), batch_size=4),
}


@pytest.mark.parametrize("wrap", [True, False], ids=["wrapped", "bare"])
@pytest.mark.parametrize("kind", KINDS)
def test_empty_draw_is_a_step_of_noise_alone(kind: str, wrap: bool) -> None:
    model, given = Wide(), KINDS[kind]()
    training = dpfix.make_private_safe(
        module=model, optimizer=sgd(model), data_loader=given, noise_multiplier=2.0, max_grad_norm=0.5,
        training_step=step, wrap_model=wrap,
    )  # fmt: skip
    drawing(training, [], [0, 1, 2], [], [])
    stepping = training[0] if wrap else model
    moved = []
    for batch in training[2]:
        before = nn.utils.parameters_to_vector(model.parameters()).detach()
        training[1].zero_grad()
        step(stepping, batch).backward()
        training[1].step()
        moved.append(nn.utils.parameters_to_vector(model.parameters()).detach() - before)
    assert len(moved) == 4
    assert training.privacy_engine.accountant.history == [(2.0, 4 / 24, 4)]
    for noise in (moved[0], moved[2], moved[3]):
        wanted = 2.0 * 0.5 / 4
        assert float(noise.std()) == pytest.approx(wanted, rel=5 / (2 * len(noise)) ** 0.5)
        assert abs(float(noise.mean())) < 5 * wanted / len(noise) ** 0.5
    assert not torch.equal(moved[0], moved[2])


def test_empty_draw_without_noise_moves_nothing() -> None:
    given = setting(noise_multiplier=0.0)
    training = dpfix.make_private_safe(**given)
    drawing(training, [])
    before = {n: p.detach().clone() for n, p in given["module"].named_parameters()}
    train(training, 1)
    assert all(torch.equal(p, before[n]) for n, p in given["module"].named_parameters())


def test_empty_draws_happen_in_ordinary_training() -> None:
    training = dpfix.make_private_safe(**setting(data_loader=loader(30, batch_size=1)))
    assert train(training, 60) == 60
    assert training.statement(1e-3).steps == 60


# ------------------------------------------------------------------ BatchMemoryManager


def memory_managed(training: dpfix.PrivateTraining, physical: int) -> BatchMemoryManager:
    _, optimizer, private = training
    return BatchMemoryManager(data_loader=private, max_physical_batch_size=physical, optimizer=optimizer)


def one_step(training: dpfix.PrivateTraining, x: Tensor, y: Tensor) -> None:
    private, optimizer, _ = training
    optimizer.zero_grad()
    F.cross_entropy(private(x), y).backward()
    optimizer.step()


def test_split_batch_releases_the_clipped_sum_of_the_whole() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    data = points(24)
    data.tensors = (data.tensors[0].double(), data.tensors[1])
    samples = gradients_one_by_one(model, classify, [(x[None], y[None]) for x, y in data])
    training = dpfix.make_private_safe(
        **setting(model, optimizer=sgd(model), data_loader=DataLoader(data, batch_size=8), noise_multiplier=0.0)
        | {"max_grad_norm": 0.3}
    )
    drawing(training, list(range(10)), [], [11, 12])
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    sizes = []
    with memory_managed(training, 4) as split:
        for x, y in split:
            one_step(training, x, y)
            sizes.append(len(x))
            if len(sizes) == 3:
                moved = {n: (before[n] - p.detach()) * 8 for n, p in model.named_parameters()}
    assert sizes[:3] == [4, 3, 3]
    assert relative_error(moved, clipped_sum(samples[:10], 0.3)) < 1e-6
    assert training.privacy_engine.accountant.history == [(0.0, 8 / 24, 3)]


def test_split_training_accounts_logical_batches() -> None:
    training = dpfix.make_private_safe(**setting(data_loader=loader(40, batch_size=8)))
    for _ in range(3):
        with memory_managed(training, 3) as split:
            for x, y in split:
                one_step(training, x, y)
    assert training.statement(1e-3).steps == 15


def test_split_loop_left_early_warns_and_discards() -> None:
    given = setting(noise_multiplier=0.0, optimizer=None)
    given["optimizer"] = sgd(given["module"])
    training = dpfix.make_private_safe(**given)
    drawing(training, list(range(10)))
    before = {n: p.detach().clone() for n, p in given["module"].named_parameters()}
    with memory_managed(training, 4) as split:
        for x, y in split:
            one_step(training, x, y)
            break
        assert all(torch.equal(p, before[n]) for n, p in given["module"].named_parameters())
    drawing(training, [0, 1])
    with pytest.warns(dpfix.DPFixWarning, match="left inside a logical batch"):
        train(training, 1)
    assert training.privacy_engine.accountant.history[-1][-1] == 2, "the draw that was left is accounted, too"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("done", [1, 2, 3])
def test_loop_after_one_that_was_left_early_makes_whole_steps(done: int, workers: int) -> None:
    """What the memory manager had signalled for batches that were not worked on must not be taken for the next ones'."""
    given = setting(noise_multiplier=0.0, max_grad_norm=0.1, data_loader=loader(24, batch_size=8, num_workers=workers))
    model = given["module"]
    given["optimizer"] = sgd(model)
    training = dpfix.make_private_safe(**given)
    drawing(training, *[list(range(24))] * 3)
    releases: list[Any] = []
    training[1].attach_step_hook(releases.append)

    def work(batches: int) -> None:
        with memory_managed(training, 8) as split:  # three physical batches for every draw
            for x, y in islice(split, batches):
                one_step(training, x, y)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dpfix.DPFixWarning)
        work(done)
        steps = len(releases)
        before = copy.deepcopy(model)
        work(3)
    assert steps == (done == 3) and len(releases) == steps + 1
    singles = [(x[None], y[None]) for x, y in points(24)]
    per_sample = gradients_one_by_one(before, classify, singles)
    moved = {n: 8 * (p.detach() - model.get_parameter(n).detach()) for n, p in before.named_parameters()}
    assert relative_error(moved, clipped_sum(per_sample, 0.1)) < 1e-4


# ------------------------------------------------------------------ the loader


def test_loader_without_sampling_is_the_users_own() -> None:
    given = setting(poisson_sampling=False)
    assert dpfix.make_private_safe(**given)[2] is given["data_loader"]


@pytest.mark.filterwarnings("ignore:.*draw.*skipped:dpfix.DPFixWarning")  # nothing is trained here
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("drop_last", [True, False])
def test_the_private_loader_answers_the_scripts_batch_size(drop_last: bool, workers: int) -> None:
    """``len(dataset) // loader.batch_size`` stands in many scripts; the draws vary about it, and none is dropped."""
    given = loader(30, batch_size=8, drop_last=drop_last, num_workers=workers)
    training = dpfix.make_private_safe(**setting(data_loader=given))
    for private in (training[2], copy.deepcopy(training[2])):
        assert (private.batch_size, private.drop_last, len(private)) == (8, drop_last, len(given))
        sizes = [len(y) for _ in range(8) for _, y in private]
        assert len(sizes) == 8 * len(given) and len(set(sizes)) > 2 and max(sizes) > 8
        with pytest.raises(ValueError, match="batch_size"):
            private.batch_size = 4


def test_the_batch_size_is_kept_through_another_call() -> None:
    first = dpfix.make_private_safe(**setting(data_loader=loader(40, batch_size=7)))
    again = dpfix.make_private_safe(**setting(data_loader=first[2]))
    assert again[2].batch_size == 7
    opacus = DPDataLoader.from_data_loader(loader(40, batch_size=8))
    assert dpfix.make_private_safe(**setting(data_loader=opacus))[2].batch_size == 8


def test_private_loader_can_be_made_private_again() -> None:
    first = dpfix.make_private_safe(**setting(data_loader=loader(40, batch_size=8)))
    second = dpfix.make_private_safe(**setting(data_loader=first[2]))
    assert second[2].sample_rate == 8 / 40
    train(second, 3)


def test_dataset_of_the_loader_is_kept() -> None:
    given = setting(
        data_loader=DataLoader(TensorDataset(*points(24).tensors), batch_size=8, collate_fn=default_collate)
    )
    assert dpfix.make_private_safe(**given)[2].dataset is given["data_loader"].dataset


def test_batches_that_another_loader_passes_over_are_not_accounted() -> None:
    """What ``accelerate.skip_first_batches`` does: another loader on the sampler, whose first batches nobody reads."""

    class PassedOver:
        def __init__(self, batches: Any, some: int) -> None:
            self.batches, self.some = batches, some

        def __iter__(self) -> Iterator[Any]:
            return (drawn for number, drawn in enumerate(self.batches) if number >= self.some)

        def __len__(self) -> int:
            return len(self.batches) - self.some

    training = dpfix.make_private_safe(**setting())
    model, optimizer, loader = training
    rest = DataLoader(loader.dataset, batch_sampler=PassedOver(loader.batch_sampler, 2), collate_fn=loader.collate_fn)
    steps = 0
    for x, y in rest:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        steps += 1
    assert steps == len(loader) - 2
    assert sum(entry[-1] for entry in training.privacy_engine.accountant.history) == steps
    training.get_epsilon(1e-3)
    assert sum(entry[-1] for entry in training.privacy_engine.accountant.history) == steps

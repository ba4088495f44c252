"""A collate function that computes from the whole batch is stopped; one that pads, sorts, shuffles or augments is not."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, default_collate

import dpfix
from dpfix.instrument import pytree
from dpfix.instrument.fixed_randomness import outside_states
from dpfix.instrument.rng import rng_untouched
from dpfix.observe.probe import Probe
from dpfix.training.follow.agenda import FIRST
from dpfix.training.follow.collation import Collation
from dpfix.training.follow.delivery import BatchLayout
from tests.training.follow.scripts import Items

COUNT = 40
Collate = Callable[[list[Any]], Any]


def vectors() -> list[Any]:
    draw = torch.Generator().manual_seed(1)
    return [(torch.randn(6, generator=draw) + 0.1 * i, i % 3) for i in range(COUNT)]


def sequences() -> list[Any]:
    draw = torch.Generator().manual_seed(2)
    return [(torch.randn(2 + i % 4, 6, generator=draw), i % 3) for i in range(COUNT)]


class Averaged(nn.Module):
    """A mean over the places of a sequence that are no padding."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            return self.inner(x)
        there = (x != 0).any(-1, keepdim=True).float()
        return (self.inner(x) * there).sum(1) / there.sum(1).clamp(min=1)


def columns(items: list[Any]) -> tuple[Tensor, Tensor]:
    x, y = zip(*items, strict=True)
    return torch.stack(x), torch.tensor(y)


# ------------------------------------------------------------------ what couples


def standardised(items: list[Any]) -> Any:
    x, y = columns(items)
    return (x - x.mean(0)) / (x.std(0, correction=0) + 1e-3), y


def standardised_sequences(items: list[Any]) -> Any:
    x, y = zip(*items, strict=True)
    whole = torch.cat(x)
    return pad_sequence([one / whole.abs().max() for one in x], batch_first=True), torch.tensor(y)


def by_numpy(items: list[Any]) -> Any:
    x = np.stack([one.numpy() for one, _ in items])
    return torch.from_numpy(x - x.mean(0)), torch.tensor([y for _, y in items])


def mixed(items: list[Any]) -> Any:
    x, y = columns(items)
    other, share = torch.randperm(len(x)), random.random()
    return share * x + (1 - share) * x[other], y


def mixed_by_numpy(items: list[Any]) -> Any:
    x, y = columns(items)
    share = float(np.random.beta(1.0, 1.0))
    return share * x + (1 - share) * x.flip(0), y


def swapped_features(items: list[Any]) -> Any:
    """CutMix: a part of every sample comes from another."""
    x, y = columns(items)
    cut = x.clone()
    cut[:, :3] = x.roll(1, 0)[:, :3]
    return cut, y


def filled_with_the_mean(items: list[Any]) -> Any:
    x, y = zip(*items, strict=True)
    return pad_sequence(list(x), batch_first=True, padding_value=float(torch.cat(x).mean())), torch.tensor(y)


def weighted(items: list[Any]) -> Any:
    x, y = columns(items)
    counts = torch.bincount(y, minlength=3).clamp(min=1)
    return x, y, (len(y) / counts)[y].float()


def with_weights(items: list[Any]) -> Any:
    x, y = columns(items)
    counts = torch.bincount(y, minlength=3).clamp(min=1)
    return x, y, len(y) / counts.float()


def with_count(items: list[Any]) -> Any:
    x, y = columns(items)
    return {"x": x, "y": y, "rare": int((y == 2).sum())}


def with_norm(items: list[Any]) -> Any:
    x, y = columns(items)
    return {"x": x, "y": y, "norm": x.norm()}


def plain(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def times_weights(model: Any, batch: Any) -> Tensor:
    x, y, w = batch
    return (w * F.cross_entropy(model(x), y, reduction="none")).mean()


def class_weights(model: Any, batch: Any) -> Tensor:
    x, y, w = batch
    return (w[y] * F.cross_entropy(model(x), y, reduction="none")).mean()


def over_the_count(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"]) * 3 / (1 + batch["rare"])


def times_the_count(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"]) * batch["rare"]


def over_the_norm(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["x"] / batch["norm"]), batch["y"])


COUPLED: list[tuple[Collate, Any, Any]] = [
    (standardised, vectors, plain),
    (standardised_sequences, sequences, plain),
    (by_numpy, vectors, plain),
    (mixed, vectors, plain),
    (mixed_by_numpy, vectors, plain),
    (swapped_features, vectors, plain),
    (filled_with_the_mean, sequences, plain),
    (weighted, vectors, times_weights),
    (with_weights, vectors, class_weights),
    (with_count, vectors, times_the_count),
    (with_norm, vectors, over_the_norm),
]


def train(collate: Collate, items: list[Any], loss: Any, steps: int = 8, workers: int = 0, **told: Any) -> Any:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model = Averaged()
    before = [p.detach().clone() for p in model.parameters()]
    try:
        private, optimizer, loader = dpfix.make_private_safe(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
            data_loader=DataLoader(Items(items), batch_size=10, collate_fn=collate, num_workers=workers),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            seed=5,
            **told,
        )
        made = 0
        while made < steps:
            for batch in loader:
                optimizer.zero_grad()
                loss(private, batch).backward()
                optimizer.step()
                made += 1
    finally:
        model.moved = any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    return model


@pytest.mark.parametrize(("collate", "items", "loss"), COUPLED, ids=[c.__name__ for c, *_ in COUPLED])
@pytest.mark.parametrize("told", [False, True], ids=["nothing", "training_step"])
def test_collation_of_the_whole_batch_is_stopped(collate: Collate, items: Any, loss: Any, told: bool) -> None:
    with pytest.raises((dpfix.DPFixError, dpfix.DPFixWarning)) as stopped:
        train(collate, items(), loss, **({"training_step": loss} if told else {}))
    assert "DPF0" in str(stopped.value) or "Python number" in str(stopped.value)


def test_it_is_named_with_its_place() -> None:
    with pytest.raises(
        dpfix.CoupledModelError, match=r"DPF046.*collate_fn \(swapped_features, test_collation\.py:\d+\)"
    ):
        train(swapped_features, vectors(), plain)


def only_now_and_then(items: list[Any]) -> Any:
    """Mixes only where values are unlike those that the call has drawn."""
    x, y = columns(items)
    return (x - x.mean(0) if bool((x.min(1).values > 20).any()) else x), y


def far_off() -> list[Any]:
    return [(x + 30, y) for x, y in vectors()]


@pytest.mark.parametrize("workers", [0, 1])
def test_what_shows_in_later_batches_only_is_stopped_where_they_are_made(workers: int) -> None:
    with pytest.raises(dpfix.CoupledModelError, match="DPF046"):
        train(only_now_and_then, far_off(), plain, steps=40, workers=workers, checks=1.0)


# ------------------------------------------------------------------ what is right


def padded(items: list[Any]) -> Any:
    x, y = zip(*items, strict=True)
    return pad_sequence(list(x), batch_first=True), torch.tensor(y)


def padded_on_the_left(items: list[Any]) -> Any:
    x, y = zip(*items, strict=True)
    longest = max(map(len, x))
    return torch.stack([F.pad(one, (0, 0, longest - len(one), 0)) for one in x]), torch.tensor(y)


def longest_first(items: list[Any]) -> Any:
    return padded(sorted(items, key=lambda item: -len(item[0])))


def shuffled(items: list[Any]) -> Any:
    random.shuffle(items)
    return columns(items)


def noisy(items: list[Any]) -> Any:
    x, y = columns(items)
    return x + 0.1 * torch.randn_like(x), y


def noisy_one_by_one(items: list[Any]) -> Any:
    return columns([(x + random.gauss(0, 0.1), y) for x, y in items])


def cropped(items: list[Any]) -> Any:
    """As many draws as a sample is long."""
    return padded([(x * torch.tensor([float(random.random() < 0.9) for _ in x])[:, None], y) for x, y in items])


def masked_and_padded(items: list[Any]) -> Any:
    """As for masked language models: places are taken out by chance in the padded batch."""
    x, y = padded(items)
    return x * (torch.rand(x.shape[:2]) > 0.2)[..., None], y


def masked_and_padded_on_the_left(items: list[Any]) -> Any:
    x, y = padded_on_the_left(items)
    return x * (torch.rand(x.shape[:2]) > 0.2)[..., None], y


def longest_first_and_noisy(items: list[Any]) -> Any:
    return padded([(x * np.random.uniform(0.9, 1.1), y) for x, y in sorted(items, key=lambda item: -len(item[0]))])


class Own:
    """Draws from a generator of its own."""

    def __init__(self) -> None:
        self.draw = np.random.default_rng(0)

    __name__ = "Own"

    def __call__(self, items: list[Any]) -> Any:
        x, y = columns(items)
        return x + torch.from_numpy(self.draw.normal(0, 0.1, x.shape)).float(), y


class Counting:
    """Counts its batches: a curriculum."""

    __name__ = "Counting"

    def __init__(self) -> None:
        self.made = 0

    def __call__(self, items: list[Any]) -> Any:
        self.made += 1
        x, y = columns(items)
        return x * min(1.0, self.made / 100), y


def emptied(items: list[Any]) -> Any:
    """Takes the items apart."""
    x = torch.stack([item.pop("x") for item in items])
    return x, torch.tensor([item.pop("y") for item in items])


def with_longest(items: list[Any]) -> Any:
    x, y = padded(items)
    return {"x": x, "y": y, "longest": x.shape[1], "total": sum(len(one) for one, _ in items)}


def with_order(items: list[Any]) -> Any:
    order = sorted(range(len(items)), key=lambda i: -len(items[i][0]))
    x, y = padded([items[i] for i in order])
    return x, y, torch.tensor(order), torch.tensor(order).argsort()


def of_names(model: Any, batch: Any) -> Tensor:
    assert batch["total"] >= batch["longest"]
    return F.cross_entropy(model(batch["x"]), batch["y"])


def first_two(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


RIGHT: list[tuple[Any, Any, Any]] = [
    (default_collate, vectors, plain),
    (padded, sequences, plain),
    (padded_on_the_left, sequences, plain),
    (longest_first, sequences, plain),
    (shuffled, vectors, plain),
    (noisy, vectors, plain),
    (noisy_one_by_one, vectors, plain),
    (Own(), vectors, plain),
    (cropped, sequences, plain),
    (masked_and_padded, sequences, plain),
    (masked_and_padded_on_the_left, sequences, plain),
    (with_longest, sequences, of_names),
    (with_order, sequences, first_two),
]
LOOKED_AT: list[tuple[Any, Any]] = [
    *((collate, items) for collate, items, _ in RIGHT),
    (longest_first_and_noisy, sequences),
    (Counting(), vectors),
    (emptied, lambda: [{"x": x, "y": y} for x, y in vectors()]),
]


@pytest.mark.parametrize(("collate", "items", "loss"), RIGHT, ids=[c.__name__ for c, *_ in RIGHT])
def test_right_collation_is_left_alone(collate: Any, items: Any, loss: Any) -> None:
    assert train(collate, items(), loss, steps=16, checks=1.0).moved


class OverPadding(Averaged):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).mean(1)


def test_padding_that_the_model_lets_in_is_seen_behind_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "Averaged", OverPadding)
    with pytest.raises(dpfix.CoupledModelError, match="padding"):
        train(masked_and_padded, sequences(), plain)


@pytest.mark.parametrize(("collate", "items"), LOOKED_AT, ids=[c.__name__ for c, *_ in LOOKED_AT])
def test_looking_finds_nothing_and_leaves_no_trace(collate: Any, items: Any) -> None:
    layout = BatchLayout.of(Probe(None, (), collate, (items()[0],)))
    assert layout.known
    collation = Collation(layout, share=1.0)
    for start in range(30):
        torch.manual_seed(start)
        with rng_untouched():
            wanted = collate(items()[start : start + 5])
            after = states()
        given = items()[start : start + 5]
        made = collation(collate, given)
        assert states() == after
        if not isinstance(collate, (Own, Counting)):
            assert pytree.alike(made, wanted)


def states() -> Any:
    return outside_states(), torch.get_rng_state().tolist()


def test_a_batch_that_is_looked_at_costs_two_calls() -> None:
    calls: list[int] = []

    def counted(items: list[Any]) -> Any:
        calls.append(len(items))
        return columns(items)

    collation = Collation(BatchLayout.of(Probe(None, (), columns, (vectors()[0],))), share=1.0)
    for start in range(FIRST):
        collation(counted, vectors()[start : start + 5])
        assert calls == [4, 4, 5], "two batches to compare, then the one that is delivered"
        calls.clear()

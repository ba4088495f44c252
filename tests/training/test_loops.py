"""Loops that look ahead, shuffle batches, leave some out or evaluate in between: every draw counts once."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.utils.data import DataLoader, Dataset

import dpfix
from tests.helpers import setting, sgd
from tests.training.steps import every_engine

PEOPLE = 16
CLIP = 1e-3
LISTS = [[0, 1], [], [2], [3, 4, 5], [], [6], [7, 8, 9, 10], [11], [12, 13], [14, 15]]
Numbered = Iterator[tuple[int, Any]]


class OneHot(Dataset[Any]):
    """Record ``i`` is the ``i``-th unit vector, so that a linear layer's release says who is in it."""

    def __len__(self) -> int:
        return PEOPLE

    def __getitem__(self, index: int) -> Any:
        return F.one_hot(torch.tensor(index), PEOPLE).float(), torch.tensor(0)


class People:
    """A private training of a linear layer without noise, and who was in each release."""

    def __init__(self, batch_size: int = 4, workers: int = 0, **changes: Any) -> None:
        self.model = nn.Linear(PEOPLE, 2, bias=False)
        nn.init.zeros_(self.model.weight)
        data = DataLoader(OneHot(), batch_size=batch_size, num_workers=workers, collate_fn=changes.pop("collate", None))
        given = {"noise_multiplier": 0.0, "max_grad_norm": CLIP, "criterion": nn.CrossEntropyLoss()} | changes
        self.training = dpfix.make_private_safe(
            module=self.model, optimizer=sgd(self.model), data_loader=data, cache=False, **given
        )
        self.scale = self.training[1].expected_batch_size / CLIP
        self.released: list[list[int]] = []

    def draw(self, lists: list[list[int]]) -> Any:
        vars(self.training[2])["batch_sampler"] = lists
        return self.training[2]

    def step(self, batch: Any, *, with_noise: bool = False) -> None:
        private, optimizer, _ = self.training
        before = self.model.weight.detach().clone()
        optimizer.zero_grad()
        F.cross_entropy(private(batch[0]), batch[1]).backward()
        optimizer.step()
        counted = (before - self.model.weight.detach()).norm(dim=0) * self.scale
        if not with_noise and bool((counted > 0.5).any()):
            assert float((counted - counted.round()).abs().max()) < 0.01
            self.released.append([i for i in range(PEOPLE) for _ in range(round(float(counted[i])))])
        else:
            self.released.append([])

    @property
    def history(self) -> Any:
        return self.training.privacy_engine.accountant.history

    @property
    def accounted(self) -> int:
        return sum(entry[-1] for entry in self.history)


def ahead(loader: Any) -> Numbered:
    batches = iter(loader)
    following = next(batches, None)
    for k in itertools.count():
        if following is None:
            return
        batch, following = following, next(batches, None)
        yield k, batch


def in_thread(loader: Any) -> Numbered:
    waiting: queue.Queue[Any] = queue.Queue(maxsize=3)

    def fill() -> None:
        for batch in loader:
            waiting.put(batch)
        waiting.put(None)

    thread = threading.Thread(target=fill)
    thread.start()
    yield from enumerate(iter(waiting.get, None))
    thread.join()


def in_pairs(loader: Any) -> Numbered:
    last: Any = None
    for numbered, following in itertools.pairwise(enumerate(loader)):
        yield numbered
        last = following
    yield last


def shuffled(loader: Any) -> Numbered:
    buffer: list[tuple[int, Any]] = []
    for numbered in enumerate(loader):
        buffer.append(numbered)
        if len(buffer) > 3:
            yield buffer.pop(numbered[0] % 3)
    yield from reversed(buffer)


def ahead_with_copies(loader: Any) -> Numbered:
    """As a loop that moves the next batch to another device while it works on this one."""
    yield from ahead((x.clone(), y.clone()) for x, y in loader)


LOOPS: dict[str, Callable[[Any], Numbered]] = {
    "plain": enumerate,  # type: ignore[dict-item]
    "ahead": ahead,
    "list": lambda loader: iter(list(enumerate(loader))),
    "backwards": lambda loader: reversed(list(enumerate(loader))),
    "thread": in_thread,
    "pairwise": in_pairs,
    "shuffled": shuffled,
    "copies": ahead_with_copies,
    "views": lambda loader: ((k, (x.view(len(x), -1)[:], y[:])) for k, (x, y) in ahead(loader)),
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", LOOPS)
def test_every_step_releases_the_draw_of_its_batch(name: str, workers: int) -> None:
    people = People(workers=workers)
    wanted = []
    for _ in range(2):
        for k, batch in LOOPS[name](people.draw(LISTS)):
            people.step(batch)
            wanted.append(LISTS[k])
    assert people.released == wanted
    assert sorted(map(len, wanted)) == sorted(map(len, LISTS * 2))
    assert people.history == [(0.0, 0.25, 2 * len(LISTS))]


@every_engine
def test_every_engine_releases_the_draw_of_its_batch(engine: str) -> None:
    people = People(grad_sample_mode=engine)
    wanted = []
    for k, batch in shuffled(people.draw(LISTS)):
        people.step(batch)
        wanted.append(LISTS[k])
    assert people.released == wanted and people.accounted == len(LISTS)


@pytest.mark.parametrize("name", ["ahead", "list", "thread", "shuffled"])
def test_on_real_draws_too(name: str) -> None:
    people = People(noise_multiplier=1.0, batch_size=2)
    for _ in range(3):
        for _, batch in LOOPS[name](people.training[2]):
            people.step(batch, with_noise=True)
    assert people.history == [(1.0, 2 / PEOPLE, 24)]


def test_loops_over_two_passes_at_once() -> None:
    people = People()
    passes = people.draw(LISTS[:5]), people.draw(LISTS[:5])
    for first, second in zip(*passes, strict=True):
        for batch in (second, first):
            people.step(batch)
    assert people.released == [ids for ids in LISTS[:5] for _ in range(2)]
    assert people.accounted == 10


def test_a_batch_is_released_once_also_when_others_are_waiting() -> None:
    people = People()
    first, *_ = batches = list(people.draw([[0, 1], [2, 3], [4, 5]]))
    people.step(first)
    with pytest.raises(dpfix.ForeignBatchError, match="without a new batch"):
        people.step(first)
    for batch in batches[1:]:
        people.step(batch)
    assert people.released == [[0, 1], [2, 3], [4, 5]] and people.accounted == 3


# ------------------------------------------------------------------ draws without a step


def ours(said: Any) -> list[str]:
    """The library's own warnings; the collector may close files of other tests meanwhile."""
    return [str(w.message) for w in said if issubclass(w.category, dpfix.DPFixWarning)]


def caught(people: People, skips: Callable[[int], bool]) -> None:
    for k, (x, y) in enumerate(people.draw(LISTS)):
        try:
            people.step((x * torch.nan if skips(k) else x, y))
        except dpfix.NonFiniteGradientError:
            continue


@pytest.mark.parametrize(
    "skips", [lambda k: k % 3 == 2, lambda k: k >= 8, lambda k: k == 0], ids=["some", "last", "first"]
)
def test_a_draw_that_is_skipped_is_accounted_and_named(skips: Callable[[int], bool]) -> None:
    people = People(noise_multiplier=1.0)
    for _ in range(2):
        for k, batch in enumerate(people.draw(LISTS)):
            if not skips(k):
                people.step(batch, with_noise=True)
    assert people.history == [(1.0, 0.25, 2 * len(LISTS))]
    del batch
    with pytest.warns(dpfix.DPFixWarning, match=r"draw\(s\) of the data_loader were skipped: .*first draw \d+") as said:
        assert people.training.statement(1e-2).steps == 2 * len(LISTS)
    assert len(ours(said)) == 1
    people.training.get_epsilon(1e-2)


def test_an_error_that_is_caught_skips_a_draw() -> None:
    people = People()
    caught(people, lambda k: k == 3)
    assert [ids for ids in people.released if ids] == [ids for k, ids in enumerate(LISTS) if ids and k != 3]
    assert people.accounted == len(LISTS)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_that_is_left_accounts_what_it_has_delivered(workers: int) -> None:
    people = People(workers=workers)
    for k, batch in enumerate(people.draw(LISTS)):
        if k == 3:
            break
        people.step(batch)
    assert people.accounted == 4, "three steps and the draw that was delivered last; workers have drawn more"
    people.step(batch)
    assert people.accounted == 4 and people.released[-1] == LISTS[3]


def test_epsilon_in_the_middle_of_a_pass_counts_what_is_under_way() -> None:
    people = People(noise_multiplier=1.0)
    engine = people.training.privacy_engine
    batches = iter(people.draw(LISTS))
    waiting = [next(batches) for _ in range(4)]
    people.step(waiting[1], with_noise=True)
    assert people.accounted == 1
    engine.get_epsilon(1e-2)
    assert people.accounted == 4
    for k in (0, 3, 2):
        people.step(waiting[k], with_noise=True)
    assert people.history == [(1.0, 0.25, 4)]


def test_a_step_with_less_noise_than_was_accounted_is_accounted_again() -> None:
    people = People(noise_multiplier=2.0)
    first, second = people.draw(LISTS[:2])
    assert people.history == [(2.0, 0.25, 2)]
    people.training[1].noise_multiplier = 1.0
    people.step(first, with_noise=True)
    assert people.history == [(2.0, 0.25, 2), (1.0, 0.25, 1)]
    people.training[1].noise_multiplier = 3.0
    people.step(second, with_noise=True)
    assert people.history == [(2.0, 0.25, 2), (1.0, 0.25, 1)]


def test_evaluation_in_the_middle_of_a_pass_is_allowed_and_accounted() -> None:
    people = People()
    private = people.training[0]
    for k, batch in enumerate(people.draw(LISTS)):
        people.step(batch)
        if k == 4:
            with torch.no_grad():
                seen = [len(private(x)) for x, _ in people.training[2]]
    assert len(seen) == len(LISTS)
    assert people.released == LISTS
    assert people.accounted == 2 * len(LISTS)
    with pytest.warns(dpfix.DPFixWarning, match=f"{len(LISTS)} draw.*skipped"):
        people.training.statement(1e-2)


def test_draws_are_accounted_when_the_training_ends() -> None:
    people = People()
    batches = iter(people.draw(LISTS))
    next(batches)
    people.training[0].to_standard_module()
    assert people.accounted == 1
    assert len(list(people.training[2])) == len(LISTS)
    assert people.accounted == 1, "what the loader delivers afterwards is not of this training"


# ------------------------------------------------------------------ other loaders over the private sampler


def remade(loader: Any) -> DataLoader[Any]:
    """A loader that a framework makes of the private one's parts."""
    return DataLoader(
        loader.dataset,
        batch_sampler=loader.batch_sampler,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        generator=loader.generator,
    )


@pytest.mark.parametrize(
    ("name", "workers"), [(name, 0) for name in LOOPS if name != "thread"] + [("plain", 2), ("ahead", 2)]
)
def test_a_loader_that_a_framework_makes_delivers_the_same_draws(name: str, workers: int) -> None:
    people = People(workers=workers)
    wanted = []
    for k, batch in LOOPS[name](remade(people.draw(LISTS))):
        people.step(batch)
        wanted.append(LISTS[k])
    assert people.released == wanted
    assert people.history == [(0.0, 0.25, len(LISTS))]


@pytest.mark.parametrize("left", [False, True])
def test_draws_that_are_skipped_with_such_a_loader_are_accounted(left: bool) -> None:
    people = People()
    lists = [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    for k, batch in enumerate(remade(people.draw(lists))):
        if k in (0, 2):
            continue
        people.step(batch)
        if left and k == 3:
            break
    assert people.released == [lists[k] for k in ((1, 3) if left else (1, 3, 4))]
    with pytest.warns(dpfix.DPFixWarning, match="2 draw.*skipped") if not left else nullcontext():
        people.training.get_epsilon(1e-2)
    assert people.accounted == (4 if left else 5)


# ------------------------------------------------------------------ BatchMemoryManager


def managed(people: People, skips: Callable[[int, int], bool], arrange: Any = enumerate) -> None:
    """Steps on parts of 4 samples; ``skips`` gets the number of the draw and that of the part in it."""
    lists = [list(range(12)), list(range(4, 16)), list(range(10)), [], [3]]
    parts = [(d, p) for d, ids in enumerate(lists) for p in range(max(1, -(-len(ids) // 4)))]
    people.draw(lists)
    with BatchMemoryManager(
        data_loader=people.training[2], max_physical_batch_size=4, optimizer=people.training[1]
    ) as split:
        for k, batch in arrange(split):
            if not skips(*parts[k]):
                people.step(batch)


WHOLE = [list(range(12)), list(range(4, 16)), list(range(10)), [3]]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", ["plain", "ahead", "list", "copies one by one"])
def test_parts_of_a_draw_are_released_together(name: str, workers: int) -> None:
    arrange = LOOPS.get(name) or (lambda split: ((k, (x.clone(), y)) for k, (x, y) in enumerate(split)))
    people = People(workers=workers)
    managed(people, lambda draw, part: False, arrange)
    assert [ids for ids in people.released if ids] == WHOLE
    assert people.history == [(0.0, 0.25, 5)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_draw_of_which_a_part_was_left_out_is_not_released_with_the_next(part: int, workers: int) -> None:
    """Draws of equal parts: the parts that follow would fill up the rest."""
    people = People(workers=workers)
    with pytest.warns(dpfix.DPFixWarning, match="skipped a part") as said:
        managed(people, lambda d, p: (d, p) == (0, part))
    assert len(ours(said)) == 1
    assert [ids for ids in people.released if ids] == WHOLE[1:]
    assert people.accounted == 5


def test_parts_of_two_draws_in_turns_are_refused() -> None:
    people = People()
    order = [0, 3, 1, 4]

    def in_turns(split: Any) -> Numbered:
        parts = list(enumerate(split))
        return iter([parts[k] for k in order])

    with (
        pytest.warns(dpfix.DPFixWarning, match="discarded"),
        pytest.raises(dpfix.ForeignBatchError, match="other parts were given up"),
    ):
        managed(people, lambda d, p: False, in_turns)
    assert not any(people.released)


def test_a_part_that_is_stepped_on_twice_is_refused() -> None:
    people = People()
    people.draw([list(range(8))])
    with BatchMemoryManager(
        data_loader=people.training[2], max_physical_batch_size=4, optimizer=people.training[1]
    ) as split:
        first, second = split
        people.step(first)
        with pytest.raises(dpfix.ForeignBatchError, match="without a new batch"):
            people.step(first)
        people.step(second)
    assert people.released[-1] == list(range(8))


def test_a_pass_in_between_leaves_the_sum_of_the_parts_alone() -> None:
    people = People()
    people.draw([list(range(8))])
    with BatchMemoryManager(
        data_loader=people.training[2], max_physical_batch_size=4, optimizer=people.training[1]
    ) as split:
        for batch in split:
            people.step(batch)
            with torch.no_grad():
                for x, _ in people.draw(LISTS[:2]):
                    people.training[0](x)
    assert people.released[-1] == list(range(8))


def test_other_loaders_are_split_as_opacus_does() -> None:
    people = People(poisson_sampling=False)
    given = people.training[2]
    with BatchMemoryManager(data_loader=given, max_physical_batch_size=2, optimizer=people.training[1]) as split:
        for batch in split:
            people.step(batch)
    assert [ids for ids in people.released if ids] == [list(range(k, k + 4)) for k in range(0, PEOPLE, 4)]


# ------------------------------------------------------------------ samples of several rows


def test_rows_that_vary_belong_to_the_draw_of_their_batch() -> None:
    class Bags(OneHot):
        def __getitem__(self, index: int) -> Any:
            x, y = super().__getitem__(index)
            return [{"x": x, "y": y}] * (1 + index % 3)

    def collate(items: list[Any]) -> Any:
        rows = [row for item in items for row in item]
        return torch.stack([row["x"] for row in rows]), torch.stack([row["y"] for row in rows])

    model = nn.Linear(PEOPLE, 2, bias=False)
    nn.init.zeros_(model.weight)
    people = People.__new__(People)
    people.model, people.released = model, []
    people.training = dpfix.make_private_safe(
        module=model, optimizer=sgd(model), noise_multiplier=0.0, max_grad_norm=CLIP, cache=False,
        data_loader=DataLoader(Bags(), batch_size=4, collate_fn=collate),
        training_step=lambda m, b: F.cross_entropy(m(b[0]), b[1]),
    )  # fmt: skip
    assert people.training.plan.row_counter is not None
    people.scale = 4 / CLIP
    lists = [[0, 5], [1, 4, 2], [2, 3], [], [6, 7], [8]]  # with as many rows in several draws
    wanted = []
    for k, batch in shuffled(people.draw(lists)):
        people.step(batch)
        wanted.append(lists[k])
    assert [sorted(set(ids)) for ids in people.released] == [sorted(ids) for ids in wanted]
    assert all(len(ids) == len(set(ids)) for ids in people.released)
    assert people.accounted == len(lists)


class Gated(nn.Module):
    """A shared layer whose second result is cut out of the graph, until told otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.cuts = nn.Linear(6, 6), nn.Linear(6, 3), True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen, other = self.first(x), self.first(x.flip(1))
        return self.last(seen + (other.detach() if self.cuts else other))


@pytest.mark.parametrize("lost", [0, 1])
def test_a_draw_that_is_lost_with_a_no_grad_region_is_accounted(lost: int) -> None:
    model = Gated()
    training = dpfix.make_private_safe(**setting(model, optimizer=sgd(model, 0.1)))
    private, optimizer, loader = training
    assert len(training.plan.no_grad_regions) == 1
    vars(loader)["batch_sampler"] = [list(range(12)), list(range(8))]
    errors = []
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=4, optimizer=optimizer) as split:
        for k, (x, y) in enumerate(split):
            model.cuts = k < lost
            optimizer.zero_grad()
            F.cross_entropy(private(x), y).backward()
            try:
                optimizer.step()
            except dpfix.MisuseError as error:
                errors.append((k, str(error)))
    assert [k for k, _ in errors] == list(range(lost, 3))
    assert "is lost" in errors[0][1] and all("other parts were given up" in text for _, text in errors[1:])
    assert training.privacy_engine.accountant.history == [(1.0, 8 / 24, 2)]

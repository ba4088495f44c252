"""Memory runs out: where the size of physical batches was found, the logical batch is begun again in smaller ones."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from monai.data import ThreadDataLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader

import dpfix
from dpfix.choose import physical
from tests.helpers import points, setting, sgd

ERROR = "CUDA out of memory."


@dataclass
class Memory:
    """Holds so many samples at a time, in one place of a step."""

    place: str = ""
    most: int = 10**6
    failed: int = 0
    error: Callable[[], Exception] = field(default=lambda: torch.OutOfMemoryError(ERROR))

    def take(self, place: str, samples: int) -> None:
        """Raises: it does not hold as many."""
        if place == self.place and samples > self.most:
            self.failed += 1
            raise self.error()


class Net(nn.Module):
    """Its layers take memory, forwards and backwards."""

    def __init__(self, memory: Memory) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.memory = nn.Linear(6, 8), nn.Linear(8, 3), memory

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        if torch.is_grad_enabled() and self.training:
            self.memory.take("forward", len(x))
            if x.requires_grad:
                x.register_hook(lambda g: self.memory.take("inside", len(g)))
        return self.second(x)


def call(memory: Memory, **changes: Any) -> tuple[Net, dpfix.PrivateTraining]:
    """A training whose draws and noise are the same every time, and whose memory has been enough for all of it so far."""
    place, memory.place = memory.place, ""
    model = Net(memory)
    arguments = setting(model, optimizer=sgd(model, 0.1), seed=3, cache=False, max_physical_batch_size="auto")
    training = dpfix.make_private_safe(**arguments | changes)
    memory.place = place
    return model, training


def one_ahead(batches: Iterable[Any]) -> Iterator[Any]:
    """As loops do that have to know which batch is the last one."""
    batches = iter(batches)
    present = next(batches)
    for following in batches:
        yield present
        present = following
    yield present


def train(
    training: dpfix.PrivateTraining, passes: int = 2, ahead: Callable[[Iterable[Any]], Iterable[Any]] = iter
) -> list[int]:
    """The sizes of what the loop gets."""
    private, optimizer, loader = training
    sizes, memory = [], private.memory
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="memory ran out")
        for _ in range(passes):
            for x, y in ahead(loader):
                optimizer.zero_grad()
                out = private(x)
                out.register_hook(lambda g: memory.take("backward", len(g)))
                F.cross_entropy(out, y).backward()
                optimizer.step()
                sizes.append(len(x))
    return sizes


def assert_same(found: tuple[Net, dpfix.PrivateTraining], wanted: tuple[Net, dpfix.PrivateTraining]) -> None:
    for (name, a), b in zip(found[0].named_parameters(), wanted[0].parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6), name
    assert found[1].privacy_engine.accountant.history == wanted[1].privacy_engine.accountant.history


def undisturbed(**changes: Any) -> tuple[Net, dpfix.PrivateTraining]:
    model, training = call(Memory(), **changes)
    train(training)
    return model, training


ON_THE_BATCH = ("bookkeeping", "hooks", "functorch")
"""Engines that call the model with all samples at once."""


@pytest.mark.parametrize(
    ("mode", "place"),
    [
        *((mode, place) for mode in ON_THE_BATCH for place in ("forward", "inside")),
        *((mode, "backward") for mode in (*ON_THE_BATCH, "vmap", "microbatch")),
    ],
)
def test_the_same_is_released_as_with_enough_memory(mode: str, place: str) -> None:
    memory = Memory(place, 3)
    model, training = call(memory, grad_sample_mode=mode)
    assert training.plan.physical == 24
    sizes = train(training)
    assert memory.failed >= 2 and sizes[0] > 3 and max(sizes[4:]) <= 3
    assert_same((model, training), undisturbed(grad_sample_mode=mode))


@pytest.mark.parametrize("options", [{"sampling": "shuffle"}, {"sampling": "truncated"}, {"clipping": "automatic"}])
def test_however_it_is_sampled_and_clipped(options: dict[str, Any]) -> None:
    memory = Memory("backward", 3)
    torch.manual_seed(1)  # of the order of a loader that shuffles
    model, training = call(memory, **options)
    torch.manual_seed(1)
    train(training)
    assert memory.failed
    torch.manual_seed(1)
    wanted = call(Memory(), **options)
    torch.manual_seed(1)
    train(wanted[1])
    assert_same((model, training), wanted)


def test_adaptive_clipping_counts_every_sample_once() -> None:
    options = {
        "clipping": "adaptive", "target_unclipped_quantile": 0.5, "clipbound_learning_rate": 0.2, "max_clipbound": 10.0,
        "min_clipbound": 0.01, "unclipped_num_std": 5.0,
    }  # fmt: skip
    memory = Memory("clip", 3)
    model, training = call(memory, **options)
    count = training[1].count

    def count_in_memory(norms: Tensor | None) -> None:
        count(norms)
        memory.take("clip", 0 if norms is None else len(norms))

    training[1].count = count_in_memory
    train(training)
    assert memory.failed
    wanted = undisturbed(**options)
    assert_same((model, training), wanted)
    assert training[1].max_grad_norm == wanted[1][1].max_grad_norm != 1.0


def test_while_the_sums_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """When some parameters have theirs and others do not."""
    memory = Memory("clip", 3)
    model, training = call(memory, grad_sample_mode="bookkeeping")
    handle = training[1].guard.guarded.handle
    add, seen = handle._add, []

    def add_in_memory(p: nn.Parameter, parts: list[Any]) -> None:
        add(p, parts)
        seen.append(p)
        memory.take("clip", len(seen) if len(seen) % 4 == 3 and not memory.failed else 0)

    monkeypatch.setattr(handle, "_add", add_in_memory)
    memory.most = 2
    train(training)
    assert memory.failed == 1
    assert_same((model, training), undisturbed(grad_sample_mode="bookkeeping"))


@pytest.mark.parametrize(("place", "workers"), [("forward", 0), ("backward", 0), ("forward", 2), ("backward", 2)])
@pytest.mark.parametrize("seed", [3, 4, 5])
def test_loops_and_workers_that_look_ahead(place: str, workers: int, seed: int) -> None:
    """Batches that were fetched before their logical batch was begun again are nobody's, large or small."""
    loader = DataLoader(points(), batch_size=4, num_workers=workers)
    memory = Memory(place, 3)
    model, training = call(memory, data_loader=loader, seed=seed)
    sizes = train(training, ahead=one_ahead)
    assert memory.failed and max(sizes[-8:]) <= 3
    assert_same((model, training), undisturbed(data_loader=DataLoader(points(), batch_size=4), seed=seed))


def test_a_loader_that_reads_in_a_thread() -> None:
    memory = Memory("backward", 3)
    model, training = call(memory, data_loader=ThreadDataLoader(points(), batch_size=8, buffer_size=3))
    train(training)
    assert memory.failed
    assert_same((model, training), undisturbed())


def test_sizes_fall_in_the_middle_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of it are summed up by then, and are not in the sum a second time."""
    monkeypatch.setattr(physical, "free_memory", lambda device, ranks: 10**9)
    memory = Memory("backward", 3)
    model, training = call(memory, data_loader=DataLoader(points(), batch_size=20))
    taken, calls = memory.take, []

    def later(place: str, samples: int) -> None:
        calls.append(place)
        if len(calls) > 6:
            taken(place, samples)

    training[2].ledger.limit_to(4)
    memory.take = later  # type: ignore[method-assign]
    train(training)
    assert memory.failed
    assert_same((model, training), undisturbed(data_loader=DataLoader(points(), batch_size=20)))


@pytest.mark.filterwarnings("ignore:memory ran out")
def test_the_sum_of_another_batch_is_left_as_it_is() -> None:
    """The loop has summed up a part of one batch, turns to the next one, and comes back to the first."""
    memory = Memory("backward")
    model, training = call(memory)
    private, optimizer, loader = training
    loader.ledger.limit_to(5)
    delivered, parts = iter(loader), list[Any]()
    while len({loader.ledger.draw_of(part).number for part in parts}) < 2:
        parts.append(next(delivered))
    numbers = [loader.ledger.draw_of(part).number for part in parts]
    assert numbers[0] == numbers[1] == 1 and numbers[-1] == 2
    first, other = parts[0], parts.pop()

    def step(batch: Any) -> None:
        optimizer.zero_grad()
        out = private(batch[0])
        out.register_hook(lambda g: memory.take("backward", len(g)))
        F.cross_entropy(out, batch[1]).backward()
        optimizer.step()

    step(first)
    memory.most = len(other[0]) - 1
    step(other)
    assert memory.failed
    memory.most = 10**6
    for batch in parts[1:]:
        step(batch)
    for batch in delivered:
        step(batch)
    wanted = call(Memory())
    train(wanted[1], 1)
    assert_same((model, training), wanted)


@pytest.mark.filterwarnings("ignore:a BatchMemoryManager loop was left")
@pytest.mark.parametrize("seed", [5, 11])
def test_parts_in_another_order_are_refused_as_without_a_lack_of_memory(seed: int) -> None:
    """Not with the lack of memory itself, although the model's call decides on another guard, under which the step is made."""
    memory, order = Memory("inside", 3), random.Random(seed)

    def shuffled(batches: Iterable[Any]) -> Iterator[Any]:
        held: list[Any] = []
        for batch in batches:
            held.append(batch)
            if len(held) == 3:
                yield held.pop(order.randrange(3))
        while held:
            yield held.pop(order.randrange(len(held)))

    _, training = call(memory, seed=seed)
    with pytest.raises(dpfix.ForeignBatchError, match="of which other parts were given up"):
        train(training, ahead=shuffled)
    assert memory.failed


def test_the_last_batch_of_a_loop_that_looks_ahead_is_not_released() -> None:
    """Nobody asks the loader for more: it is accounted all the same, as every draw that was delivered."""
    memory = Memory()
    model, training = call(memory, data_loader=DataLoader(points(), batch_size=24))
    private, optimizer, loader = training
    ((x, y),) = batches = list(loader)
    before = [p.detach().clone() for p in model.parameters()]
    memory.place, memory.most = "inside", 3
    with pytest.warns(dpfix.DPFixWarning, match="cannot be delivered again. It is accounted and not released"):
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(private(x), y).backward()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    sizes = train(training, 1)
    assert max(sizes) <= 12
    training.get_epsilon(1e-5)
    assert training.privacy_engine.accountant.history[0][2] == 2


def test_what_is_said() -> None:
    _, training = call(Memory("forward", 3))
    private, optimizer, loader = training
    batches = iter(loader)
    x, y = next(batches)
    loss = F.cross_entropy(private(x), y)
    assert loss.requires_grad
    loss.backward()
    text = f"memory ran out with {len(x)} samples at a time: the batch is delivered again from its start, in parts of at most"
    with pytest.warns(dpfix.DPFixWarning, match=text):
        optimizer.step()


def test_outputs_are_those_of_the_model() -> None:
    memory = Memory("forward", 3)
    model, training = call(memory)
    x, _ = next(iter(training[2]))
    found = training[0](x)
    assert memory.failed and torch.allclose(found, model.eval()(x), atol=1e-6)


def test_a_single_sample_that_does_not_fit_is_an_error() -> None:
    _, training = call(Memory("backward", 0))
    with pytest.raises(torch.OutOfMemoryError, match=ERROR):
        train(training)


@pytest.mark.parametrize("size", [5, None])
def test_a_size_that_is_told_is_kept(size: int | None) -> None:
    for place in ("forward", "inside"):
        _, training = call(Memory(place, 3), max_physical_batch_size=size)
        with pytest.raises(torch.OutOfMemoryError, match=ERROR):
            train(training)


@pytest.mark.parametrize("place", ["forward", "backward"])
def test_other_errors_pass_through(place: str) -> None:
    _, training = call(Memory(place, 3, error=lambda: RuntimeError("shapes do not fit")))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        train(training)


def test_memory_of_the_processor_is_meant_too() -> None:
    text = (
        "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
    )
    memory = Memory("backward", 3, error=lambda: RuntimeError(text))
    model, training = call(memory)
    train(training)
    assert memory.failed
    assert_same((model, training), undisturbed())


def test_a_backward_pass_of_another_model_is_none_of_it() -> None:
    """Not even when the loop has called the private one before."""
    _, training = call(Memory())
    batches = iter(training[2])
    training[0](next(batches)[0])
    other = nn.Linear(2, 1)
    out = other(torch.ones(3, 2)).sum()

    def fail(_: Tensor) -> None:
        raise torch.OutOfMemoryError(ERROR)

    out.register_hook(fail)
    with pytest.raises(torch.OutOfMemoryError, match=ERROR):
        out.backward()


@pytest.mark.filterwarnings("ignore:memory ran out")
def test_a_loop_that_makes_no_step_for_what_failed() -> None:
    """What it goes on to is delivered again too, and is not taken for a part of its draw."""
    for most, skipped in ((24, 0), (4, 0), (4, 1), (4, 3)):
        memory = Memory()
        model, training = call(memory, data_loader=DataLoader(points(), batch_size=12), seed=3)
        private, optimizer, loader = training
        loader.ledger.limit_to(most)
        number = 0
        for _ in range(2):
            for x, y in loader:
                optimizer.zero_grad()
                memory.place, memory.most = "forward", 1 if number == skipped else 100
                loss = F.cross_entropy(private(x), y)
                loss.backward()
                number += 1
                if number - 1 != skipped:
                    optimizer.step()
        assert_same((model, training), undisturbed(data_loader=DataLoader(points(), batch_size=12)))


@pytest.mark.filterwarnings("ignore:memory ran out")
def test_it_runs_out_again_in_the_loss_of_a_batch_that_was_given_up() -> None:
    memory = Memory("forward", 3)
    model, training = call(memory)
    private, optimizer, loader = training
    failed = []
    for x, y in loader:
        optimizer.zero_grad()
        out = private(x)
        if out.grad_fn is not None and memory.failed > len(failed):
            failed.append(out.register_hook(lambda g: memory.take("forward", 10**7)))
        F.cross_entropy(out, y).backward()
        memory.failed = len(failed)
        optimizer.step()
    assert failed
    train(training, 1)
    assert_same((model, training), undisturbed())


@pytest.mark.parametrize("mode", [*ON_THE_BATCH, "vmap", "microbatch"])
def test_while_gradients_are_collected(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory()
    model, training = call(memory, grad_sample_mode=mode)
    handle = training[1].guard.guarded.handle
    name = "announce" if handle.clips else "collect"
    collect = getattr(handle, name)

    def collect_in_memory(parameters: Any) -> list[int]:
        counts = collect(parameters)
        memory.take("collect", sum(counts))
        return counts

    monkeypatch.setattr(handle, name, collect_in_memory)
    memory.place, memory.most = "collect", 3
    train(training)
    assert memory.failed
    assert_same((model, training), undisturbed(grad_sample_mode=mode))

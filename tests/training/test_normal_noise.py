"""Normal noise for all parameters at once: right numbers, the same with any number of threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

import dpfix
from dpfix.sampling.randomness import Stream
from dpfix.training import normal_noise
from dpfix.training.normal_noise import add_normal
from tests.cases import mlp
from tests.helpers import setting, train

SHAPES = ((3,), (), (0,), (700, 900), (5, 2), (1000, 1000), (17,))


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def zeros(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.zeros(shape, dtype=dtype) for shape in SHAPES]


def flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.flatten() for t in tensors])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_it_is_normal_and_nothing_comes_twice(dtype: torch.dtype) -> None:
    totals, stream = zeros(dtype), Stream((1,))
    add_normal(totals, 2.0, stream)
    first = flat(totals).double()
    add_normal(totals, 2.0, stream)
    second = flat(totals).double() - first
    for noise in (first, second):
        assert abs(float(noise.mean())) < 0.01 and abs(float(noise.std()) / 2 - 1) < 0.005
        assert abs(float((noise / 2).pow(4).mean()) - 3) < 0.1
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 0.005
    if dtype is torch.float64:
        assert len(torch.unique(torch.cat([first, second]))) == 2 * len(first)


def test_the_numbers_do_not_depend_on_the_number_of_threads() -> None:
    found = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        totals, stream = zeros(), Stream((1,))
        for _ in range(2):
            add_normal(totals, 2.0, stream)
        found.append(flat(totals))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_it_is_added_in_place_wherever_the_numbers_lie() -> None:
    plain = [torch.arange(24.0).view(2, 3, 2, 2), torch.arange(6.0)]
    other = [plain[0].to(memory_format=torch.channels_last).clone(), plain[1].clone()]
    assert not other[0].is_contiguous()
    kept = [t.clone() for t in other]
    add_normal(other, 1.0, Stream((1,)))
    noise = flat(other) - flat(kept)
    assert len(torch.unique(noise)) == 30 and float(noise.abs().min()) > 0


def test_a_stream_goes_on_from_where_another_was() -> None:
    one, other = Stream((1,)), Stream((2,))
    add_normal(zeros(), 1.0, one)
    other.go_on(one.state())
    again = [zeros(), zeros()]
    add_normal(again[0], 1.0, one)
    add_normal(again[1], 1.0, other)
    assert torch.equal(*map(flat, again))


def test_an_interrupt_leaves_no_thread_that_still_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(2)
    here, draw, done = threading.current_thread(), normal_noise._draw, list[str]()

    def interrupted(*arguments: object) -> None:
        if threading.current_thread() is here:
            raise KeyboardInterrupt
        draw(*arguments)  # type: ignore[arg-type]
        done.append(threading.current_thread().name)

    monkeypatch.setattr(normal_noise, "_draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        add_normal(zeros(), 1.0, Stream((1,)))
    assert len(done) == 3, "seven lanes in turn by two threads"


@pytest.mark.parametrize("given", ["seed", "noise_generator"])
def test_every_engine_adds_the_same_numbers(given: str) -> None:
    """Which engine is fastest depends on the machine; a run with a seed does not."""
    found = []
    for engine in ("bookkeeping", "vmap", "microbatch", "hooks"):
        torch.manual_seed(0)
        value = 1 if given == "seed" else torch.Generator().manual_seed(1)
        options = {"grad_sample_mode": engine, "noise_multiplier": 1e3, given: value, "cache": False}
        model = mlp()
        training = dpfix.make_private_safe(**setting(model, **({"seed": 1} | options)))
        if given == "noise_generator":
            value.manual_seed(1)
        train(training, 1)
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert all(torch.allclose(one, found[0], rtol=1e-4) for one in found)

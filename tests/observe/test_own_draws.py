"""Draws from a generator of one's own are those of torch's global generator, and no other thread's count."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpfix.instrument.fixed_randomness import FixedRandomness
from dpfix.instrument.own_draws import draws_from

ONES, MANY = torch.ones(6, 7, 3), torch.full((40,), 0.3)

DRAWING: dict[str, Callable[[], Tensor]] = {
    "rand": lambda: torch.rand(3, 4),
    "randn": lambda: torch.randn(30),
    "randint": lambda: torch.randint(9, (5,)),
    "randint from": lambda: torch.randint(2, 9, (5,)),
    "randperm": lambda: torch.randperm(9),
    "rand_like": lambda: torch.rand_like(MANY),
    "randn_like": lambda: torch.randn_like(MANY),
    "randint_like": lambda: torch.randint_like(MANY, 2, 9),
    "bernoulli": lambda: torch.bernoulli(MANY),
    "bernoulli_": lambda: torch.zeros(40).bernoulli_(0.3),
    "normal_": lambda: torch.zeros(40).normal_(1, 2),
    "normal": lambda: torch.normal(MANY, MANY),
    "uniform_": lambda: torch.zeros(40).uniform_(),
    "exponential_": lambda: torch.zeros(4).exponential_(),
    "multinomial": lambda: torch.multinomial(MANY.view(4, 10), 3),
    "poisson": lambda: torch.poisson(MANY),
    "gamma": lambda: torch.distributions.Gamma(MANY, MANY).sample(),
    "dropout": lambda: F.dropout(ONES, 0.4),
    "dropout of everything": lambda: F.dropout(ONES, 1.0),
    "dropout with a graph": lambda: F.dropout(ONES.clone().requires_grad_(), 0.4),
    "dropout1d": lambda: F.dropout1d(ONES, 0.4),
    "alpha dropout": lambda: F.alpha_dropout(ONES, 0.4),
    "rrelu": lambda: F.rrelu(-ONES, training=True),
    "gumbel": lambda: F.gumbel_softmax(MANY),
    "attention": lambda: F.scaled_dot_product_attention(*torch.randn(3, 2, 4, 5, 8), dropout_p=0.4),
    "lstm": lambda: nn.LSTM(3, 4, 2, dropout=0.5)(torch.randn(5, 3, 3))[0],
    "transformer": lambda: nn.TransformerEncoderLayer(8, 2)(torch.randn(3, 4, 8)),
    "vmap": lambda: torch.func.vmap(lambda x: F.dropout(x, 0.5), randomness="different")(ONES),
}


@pytest.fixture
def another_thread() -> Iterator[None]:
    """One that draws all the time."""
    over = threading.Event()

    def draw() -> None:
        while not over.is_set():
            torch.rand(3)

    thread = threading.Thread(target=draw, daemon=True)
    thread.start()
    yield
    over.set()
    thread.join(60)


@pytest.mark.parametrize("draw", DRAWING.values(), ids=DRAWING)
def test_they_are_those_of_the_global_generator(draw: Callable[[], Tensor], request: pytest.FixtureRequest) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    wanted, state = draw(), torch.get_rng_state()
    request.getfixturevalue("another_thread")
    with draws_from(before) as now:
        found = draw()
        assert torch.equal(now(), state)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("draw", DRAWING.values(), ids=DRAWING)
def test_fixed_randomness_is_the_same_beside_another_thread(
    draw: Callable[[], Tensor], request: pytest.FixtureRequest
) -> None:
    with FixedRandomness():
        wanted = draw()
    request.getfixturevalue("another_thread")
    for _ in range(20):
        with FixedRandomness():
            assert torch.equal(draw(), wanted)


def test_a_generator_that_the_script_gives_is_taken(another_thread: None) -> None:
    mine, again = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    with draws_from(torch.get_rng_state()):
        found = torch.rand(4, generator=mine), torch.zeros(4).normal_(generator=mine)
    assert torch.equal(found[0], torch.rand(4, generator=again))
    assert torch.equal(found[1], torch.zeros(4).normal_(generator=again))

"""An interrupt in the loop leaves nothing behind that a later step would add up."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import dpfix
from dpfix.engines import ENGINES
from tests.helpers import points, sgd
from tests.interrupts import Lines, lines_of, spread
from tests.reference import clipped_sum, gradients_one_by_one

DRAW = [0, 3, 4, 9]
CLIP = 0.2

pytestmark = pytest.mark.filterwarnings("ignore:.*draw.*of the data_loader were skipped:dpfix.DPFixWarning")


class Model(nn.Module):
    """A layer that is used twice, one that is used once, parameters that no layer owns."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.twice(self.norm(self.first(x))))
        return self.head(torch.tanh(self.twice(x)))


class Scaled(Model):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


def step_of(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


class Loop:
    """One iteration of a training loop at a time, always from the same parameters."""

    def __init__(self, engine: str, *, late: bool = False) -> None:
        torch.manual_seed(0)
        engine, _, mapped = engine.partition(" ")
        self.module = Scaled() if mapped or engine in ("vmap", "microbatch") else Model()
        self.late = late
        self.before = [p.detach().clone() for p in self.module.parameters()]
        data = points()
        singles = [(data.tensors[0][i : i + 1], data.tensors[1][i : i + 1]) for i in DRAW]
        total = clipped_sum(gradients_one_by_one(self.module, step_of, singles), CLIP)
        self.wanted = torch.cat([-g.flatten() for g in total.values()]).float() / 8
        with warnings.catch_warnings(action="ignore"):
            self.training = dpfix.make_private_safe(
                module=self.module, optimizer=sgd(self.module), data_loader=DataLoader(data, batch_size=8),
                criterion=nn.CrossEntropyLoss(), noise_multiplier=0.0, max_grad_norm=CLIP, grad_sample_mode=engine,
            )  # fmt: skip
        vars(self.training[2])["batch_sampler"] = [DRAW]

    def iterate(self) -> None:
        model, optimizer, loader = self.training
        for batch in loader:
            if not self.late:
                optimizer.zero_grad()
            loss = step_of(model, batch)
            if self.late:
                optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def reset(self) -> None:
        with torch.no_grad():
            for p, value in zip(self.module.parameters(), self.before, strict=True):
                p.copy_(value)

    def moved(self) -> Tensor:
        self.reset()
        self.iterate()
        pairs = zip(self.module.parameters(), self.before, strict=True)
        return torch.cat([(p.detach() - value).flatten() for p, value in pairs])


def check(engine: str, parts: int, *, late: bool = False) -> None:
    loop = Loop(engine, late=late)
    torch.testing.assert_close(loop.moved(), loop.wanted, atol=1e-5, rtol=1e-3)
    loop.iterate()
    lines = lines_of(loop.iterate)
    wrong = {}
    for at in spread(lines, parts):
        interrupt = Lines(at)
        interrupt.run(loop.iterate)
        try:
            moved = loop.moved()
        except dpfix.DPFixError as error:
            wrong[interrupt.place] = str(error)[:100]
            loop = Loop(engine, late=late)
        else:
            if not torch.allclose(moved, loop.wanted, atol=1e-5, rtol=1e-3):
                wrong[interrupt.place] = float((moved - loop.wanted).norm() / loop.wanted.norm())
                loop = Loop(engine, late=late)
    assert not wrong


LOOPS = [(engine, late) for engine in (*ENGINES, "bookkeeping mapped") for late in (False, True)] + [("ew", False)]
"""Engines, and loops that clear gradients after the forward pass, which torch's expanded weights do not allow."""


@pytest.mark.parametrize(("engine", "late"), LOOPS)
def test_the_step_after_an_interrupt_is_right(engine: str, late: bool) -> None:
    check(engine, 60, late=late)


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "late"), LOOPS)
def test_after_an_interrupt_at_any_line(engine: str, late: bool) -> None:
    check(engine, 10_000, late=late)


class Stopped(Exception):
    """Of the script's own."""


@pytest.mark.parametrize("engine", [*ENGINES, "ew"])
@pytest.mark.parametrize("where", ["first", "twice", "head", "loss"])
def test_an_error_of_the_script_leaves_nothing(where: str, engine: str) -> None:
    """In the forward pass, or in the backward pass: a hook on what a layer returns."""
    loop = Loop(engine)

    def stop(*_: Any) -> Any:
        raise Stopped

    def stop_backward(module: nn.Module, args: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(stop)

    places: list[Callable[[], Any]] = [
        lambda: loop.module.get_submodule(where).register_forward_hook(stop),
        lambda: loop.module.get_submodule(where).register_forward_hook(stop_backward),
    ]
    if where == "loss":
        places = [lambda: torch.nn.modules.module.register_module_forward_pre_hook(stop)]
    for place in places:
        hook = place()
        with contextlib.suppress(Stopped):  # under vmap gradients pass no hook of the script's
            loop.iterate()
        hook.remove()
        torch.testing.assert_close(loop.moved(), loop.wanted, atol=1e-5, rtol=1e-3)

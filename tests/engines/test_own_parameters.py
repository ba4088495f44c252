"""Modules that use parameters of their own: on the whole batch, function by function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dpfix.engines.bookkeeping import Bookkeeping
from dpfix.engines.bookkeeping.own_parameters import OwnParametersForward
from dpfix.engines.bookkeeping.unknown_module import UnknownModuleForward
from dpfix.errors import PlanBrokenError
from dpfix.instrument.parameter_uses import bare, function_in, used_in
from tests.engines.comparing import STEP, check, floats, ids, plan_for, probe_of

T, D = 5, 4


class Uses(nn.Module):
    """Parameters of its own around two layers."""

    def __init__(self, use: Callable[[Any, Tensor], Tensor], **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))
        self.register_buffer("fixed", torch.arange(D))
        self.before, self.after, self.use = nn.Linear(D, D), nn.Linear(D, 3), use

    def forward(self, x: Tensor) -> Tensor:
        return self.after(torch.tanh(self.use(self, torch.tanh(self.before(x)))))


def tokens_and_positions(m: Any, x: Tensor) -> Tensor:
    return torch.cat([m.cls.expand(len(x), -1, -1), x], 1) + m.pos[:, : x.shape[1] + 1]


def in_place(m: Any, x: Tensor) -> Tensor:
    x = x * 1
    x += m.a
    return x.mul_(m.b)


def relative(m: Any, x: Tensor) -> Tensor:
    place = torch.arange(T)
    table = m.table[(place[:, None] - place[None, :] + T - 1).flatten()].view(T, T)
    return torch.softmax(x @ x.mT + table, -1) @ x


def standardised(m: Any, x: Tensor) -> Tensor:
    weight = (m.w - m.w.mean(1, keepdim=True)) / (m.w.std(1, keepdim=True) + 1e-3)
    return F.linear(x, weight, m.b)


class Tied(nn.Module):
    """A language model whose table is its head, with a normalisation that is written out."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.scale = nn.Embedding(7, D), nn.Parameter(torch.ones(D))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        return F.linear(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.scale, self.table.weight)


def uses(use: Callable[[Any, Tensor], Tensor], **shapes: tuple[int, ...]) -> Callable[[], nn.Module]:
    return lambda: Uses(use, **shapes)


def masked(of: Callable[[Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    def use(m: Any, x: Tensor) -> Tensor:
        h = torch.sin(x)
        h[of(x)] = m.a.to(h.dtype)
        return h + m.b

    return use


class Distances(nn.Module):
    """Attention that goes through ``vmap``, and looks up the same distances for all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.scale = nn.Embedding(T, D), nn.Parameter(torch.ones(D))

    def forward(self, x: Tensor) -> Tensor:
        scaled = torch.einsum("ntd,d->ntd", x, self.scale)
        return scaled + self.table(torch.arange(x.shape[1])).sin()


class Around(nn.Module):
    """A parameter on the whole batch around a module that is mapped."""

    def __init__(self) -> None:
        super().__init__()
        self.instead, self.inside = nn.Parameter(torch.ones(D)), Distances()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(x)
        h[x[..., 0] > 0] = self.instead
        return self.inside(h)


BATCH = floats(T, D)
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Any]]] = {
    "token and positions": (uses(tokens_and_positions, cls=(1, 1, D), pos=(1, T + 2, D)), BATCH),
    "repeat": (uses(lambda m, x: torch.cat([m.cls.repeat(len(x), 1, 1), x], 1), cls=(1, 1, D)), BATCH),
    "repeat of rows": (uses(lambda m, x: x + m.a.repeat(len(x), T, 1), a=(D,)), BATCH),
    "expand_as": (uses(lambda m, x: x * m.a.expand_as(x), a=(D,)), BATCH),
    "broadcast_to": (uses(lambda m, x: x * torch.broadcast_to(m.a, x.shape), a=(T, 1)), BATCH),
    "scale": (uses(lambda m, x: m.a * x, a=(D,)), BATCH),
    "one number": (uses(lambda m, x: x / m.a.exp() - m.a, a=()), BATCH),
    "from a number": (uses(lambda m, x: (1 - m.a) * x + m.a * x.flip(1), a=(D,)), BATCH),
    "in place": (uses(in_place, a=(1, T, D), b=(D,)), BATCH),
    "where": (uses(lambda m, x: torch.where(x > 0, x, m.a), a=(1, 1, D)), BATCH),
    "under a mask": (uses(masked(lambda x: x[..., 0] > 0), a=(D,), b=(D,)), BATCH),
    "under a mask of numbers": (uses(masked(lambda x: x > 0), a=(), b=(D,)), BATCH),
    "under a mask of samples": (uses(masked(lambda x: x[:, 0, 0] > 0), a=(T, D), b=(D,)), BATCH),
    "addcmul": (uses(lambda m, x: torch.addcmul(m.a, x, m.b), a=(T, 1), b=(D,)), BATCH),
    "power": (uses(lambda m, x: (x.abs() + 1) ** m.a, a=(D,)), BATCH),
    "linear": (uses(lambda m, x: F.linear(x, m.w, m.b), w=(D, D), b=(D,)), BATCH),
    "linear by name": (uses(lambda m, x: F.linear(input=x, bias=m.b, weight=m.w), w=(D, D), b=(D,)), BATCH),
    "linear without bias": (uses(lambda m, x: F.linear(x, m.w), w=(D, D)), BATCH),
    "matmul": (uses(lambda m, x: x @ m.w, w=(D, D)), BATCH),
    "matmul of a row": (uses(lambda m, x: torch.matmul(x, m.w.t() * 2), w=(D, D)), floats(D)),
    "group norm": (uses(lambda m, x: F.group_norm(x, 1, m.w, m.b, 0.1), w=(T,), b=(T,)), BATCH),
    "group norm without shift": (uses(lambda m, x: F.group_norm(x, num_groups=T, weight=m.w * 2), w=(T,)), BATCH),
    "layer norm": (uses(lambda m, x: F.layer_norm(x, (D,), m.w, m.b), w=(D,), b=(D,)), BATCH),
    "layer norm of torch": (uses(lambda m, x: torch.layer_norm(x, [D], bias=m.b, weight=m.w), w=(D,), b=(D,)), BATCH),
    "twice": (uses(lambda m, x: F.linear(F.linear(x, m.w).relu(), m.w) * m.w[0], w=(D, D)), BATCH),
    "relative positions": (uses(relative, table=(2 * T - 1,)), BATCH),
    "standardised": (uses(standardised, w=(D, D), b=(D,)), BATCH),
    "of two parameters": (uses(lambda m, x: x * (m.a @ m.b) + (m.a * 2).sum(), a=(T, 2), b=(2, D)), BATCH),
    "time first": (uses(lambda m, x: (x.transpose(0, 1) * m.a + m.b).transpose(0, 1), a=(T, 1, D), b=(D,)), BATCH),
    "rows of a sample": (uses(lambda m, x: (x.flatten(0, 1) * m.a).view(x.shape) + m.b, a=(D,), b=(T, D)), BATCH),
    "one for each sample": (uses(lambda m, x: torch.stack([x, m.a.expand(len(x), T, D)]).sum(0), a=(D,)), BATCH),
    "with a constant": (uses(lambda m, x: x * (m.a + torch.arange(D)), a=(D,)), BATCH),
    "weight of what is the same for all": (uses(lambda m, x: x + F.linear(m.fixed.double(), m.w), w=(D, D)), BATCH),
    "parts": (uses(lambda m, x: x * m.a.chunk(2)[0] + m.a.chunk(2)[1], a=(2 * D,)), BATCH),
    "lookup": (Tied, ids(7, T)),
}


def attached(model: nn.Module, make: Callable[[int], Any]) -> set[type]:
    torch.manual_seed(1)
    plan, _ = plan_for(model.double().train(), probe_of(make))
    handle = Bookkeeping().attach(model, plan)
    try:
        return {type(replaced) for replaced in handle._replaced}
    finally:
        handle.detach()


@pytest.mark.parametrize("name", CASES)
def test_equals_the_batch_of_one_reference(name: str) -> None:
    model, make = CASES[name]
    check(model(), make)


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_mapped(name: str) -> None:
    model, make = CASES[name]
    assert UnknownModuleForward not in attached(model(), make)


def test_a_mapped_module_inside_keeps_nothing_off_the_batch() -> None:
    check(Around(), BATCH)
    assert {OwnParametersForward, UnknownModuleForward} <= attached(Around(), BATCH)


@settings(max_examples=30, deadline=None)
@given(
    shape=st.sampled_from([(), (1,), (D,), (1, D), (T, 1), (T, D), (1, 1, 1), (1, T, D), (1, 1, D)]),
    function=st.sampled_from([torch.add, torch.sub, torch.mul, torch.div, torch.maximum]),
    swapped=st.booleans(), time_first=st.booleans(),
)  # fmt: skip
def test_functions_that_broadcast(shape: tuple[int, ...], function: Any, swapped: bool, time_first: bool) -> None:
    def use(m: Any, x: Tensor) -> Tensor:
        if time_first and m.a.dim() < 3 and (m.a.dim() < 2 or m.a.shape[0] == 1):
            return function(x.transpose(0, 1), m.a).transpose(0, 1)
        return function(m.a, x.exp() + 9) if swapped else function(x, m.a)

    check(Uses(use, a=shape), BATCH)


class Returned(nn.Module):
    """Gives back something made of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Scaled()

    def forward(self, x: Tensor) -> Tensor:
        out, scale = self.inner(x)
        return out * scale


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones(D))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * self.a, (self.a * 2).view(1, 1, D)


MAPPED: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Any]]] = {
    "no rule": (uses(lambda m, x: torch.einsum("btd,d->btd", x, m.a), a=(D,)), BATCH),
    "no rule for what is made": (uses(lambda m, x: torch.einsum("btd,d->btd", x, m.a * 2), a=(D,)), BATCH),
    "for each sample and for all": (uses(lambda m, x: x * (m.a.expand(len(x), T, D) + m.a), a=(D,)), BATCH),
    "input of a layer": (uses(lambda m, x: x + m.before(m.a * 2), a=(1, D)), BATCH),
    "a layer of constants": (uses(lambda m, x: x * m.a + m.before(torch.ones(T, D).double()), a=(1, D)), BATCH),
    "given back": (Returned, BATCH),
    "one function both ways": (uses(lambda m, x: x * m.a * (m.a * m.fixed), a=(D,)), BATCH),
}  # fmt: skip


@pytest.mark.parametrize("name", MAPPED)
def test_what_has_no_rule_is_mapped_and_right(name: str) -> None:
    model, make = MAPPED[name]
    check(model(), make)


def test_a_module_without_a_rule_is_mapped() -> None:
    for name, (make, batch) in MAPPED.items():
        assert UnknownModuleForward in attached(make(), batch), name
    assert OwnParametersForward in attached(CASES["scale"][0](), BATCH)


def test_parts_of_a_use() -> None:
    use = "(table@__getitem__/2)&(a&b@add/2)&c@linear/3"
    assert used_in(use) == ["(table@__getitem__/2)", "(a&b@add/2)", "c"]
    assert function_in(use) == function_in(f"({use})") == "linear"
    assert bare(use) == bare(f"({use})") == use
    assert used_in("((a@mul/1)@add/2)") == ["(a@mul/1)"] and used_in("(a@mul/1)@add/2") == ["(a@mul/1)"]


class Sometimes(nn.Module):
    """Uses a parameter in another way once it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.way = nn.Parameter(torch.ones(D)), "shown"

    def forward(self, x: Tensor) -> Tensor:
        made = self.a * 2
        if self.way == "past":
            return Past.apply(x, made)
        return (x - self.a if self.way == "other" else x) * made


class Past(torch.autograd.Function):
    """A function that no mode sees."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor) -> Tensor:
        ctx.save_for_backward(x, a)
        return x * a

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, a = ctx.saved_tensors
        return g * a, (g * x).sum((0, 1))


@pytest.mark.parametrize("way", ["other", "past"])
def test_a_use_that_was_not_shown_stops_the_step(way: str) -> None:
    model = Sometimes().double().train()
    probe = probe_of(BATCH)
    plan, _ = plan_for(model, probe)
    handle = Bookkeeping().attach(model, plan)
    try:
        model.way = way
        with pytest.raises(PlanBrokenError, match="`a"):
            STEP.loss(model, probe.batch).backward()
    finally:
        handle.detach()

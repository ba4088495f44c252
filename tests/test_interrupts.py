"""A call happens as a whole or not at all, wherever it is interrupted."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import dpfix
from tests.helpers import points, setting, train
from tests.interrupts import Lines, differences, fingerprint, lines_of, spread


class Siamese(nn.Module):
    """A branch without gradient, dropout, a buffer that forward writes, a layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(0.2))
        self.head, self.unused = nn.Linear(8, 3), nn.Linear(2, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        target = self.body(x * 0.5).detach()
        return self.head(self.body(x) + target)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(3, 4, batch_first=True), nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x.view(-1, 2, 3))[0][:, -1])


MODELS: dict[str, Callable[[], nn.Module]] = {
    "siamese": Siamese,
    "recurrent": Recurrent,
    "layers": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 4, 2), nn.BatchNorm1d(4), nn.ReLU(True), nn.Flatten(), nn.Linear(8, 3)
    ),
}


def arguments(name: str, engine: str = "auto") -> dict[str, Any]:
    torch.manual_seed(0)
    model = MODELS[name]()
    given = setting(model, grad_sample_mode=engine, cache=False)
    given["data_loader"] = DataLoader(points(), batch_size=8, generator=torch.Generator().manual_seed(1))
    if name != "recurrent":
        for p in model.parameters():
            p.grad = torch.ones_like(p)
    return given


def call(given: dict[str, Any]) -> Any:
    with warnings.catch_warnings(action="ignore"):
        return dpfix.make_private_safe(**given)


def interrupted(
    name: str, engine: str, parts: int, error: type[BaseException], seed: int = 0, last: int = 4
) -> tuple[int, dict[str, list[str]], dict[str, Any]]:
    """How many interrupts came out of calls, what they left and where, and arguments that were interrupted."""
    call(arguments(name, engine))  # the first call of a process runs more lines
    total = lines_of(lambda: call(arguments(name, engine)))
    given = arguments(name, engine)
    before = fingerprint(given)
    came, left = 0, {}
    for at in spread(total, parts, seed, last):
        lines = Lines(at, error)
        came += (stopped := lines.run(partial(call, given)))
        if not stopped:
            given = arguments(name, engine)  # a shorter run: timing decides how long it is
            before = fingerprint(given)
        elif found := differences(before, fingerprint(given)):
            left[lines.place] = found[:3]
            given = arguments(name, engine)
            before = fingerprint(given)
    return came, left, given


def check(name: str, engine: str, parts: int, error: type[BaseException] = KeyboardInterrupt) -> None:
    came, left, given = interrupted(name, engine, parts, error)
    assert came and not left
    assert train(call(given), 2) == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("name", MODELS)
def test_an_interrupt_of_the_call_leaves_nothing(name: str, error: type[BaseException]) -> None:
    check(name, "bookkeeping", 8, error)


@pytest.mark.parametrize("engine", ["auto", "vmap", "hooks", "functorch", "microbatch", "ew"])
def test_whatever_the_engine(engine: str) -> None:
    check("layers", engine, 4)


PRECISION = "double_precision.py"
"""The lines that switch the precision in which torch creates tensors, among others."""


def test_an_interrupt_while_the_precision_is_switched() -> None:
    given = arguments("layers")
    before = fingerprint(given)
    for at in range(3, 8):  # entered and left
        assert (lines := Lines(at, within=PRECISION)).run(partial(call, given)), lines.place
        assert not differences(before, fingerprint(given)), lines.place


def test_an_interrupt_while_the_precision_is_switched_in_the_first_step() -> None:
    for at in range(3, 8):  # entered and left
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        loader = DataLoader([{"a": x, "b": y} for x, y in points()], batch_size=8)
        model, _, loader = dpfix.make_private_safe(**setting(model, data_loader=loader, noise_multiplier=0.0))
        x = next(iter(loader))["a"]
        modes = torch.overrides._get_current_function_mode_stack()
        assert (lines := Lines(at, within=PRECISION)).run(partial(model, x)), lines.place
        assert torch.get_default_dtype() is torch.float32, lines.place
        assert torch.overrides._get_current_function_mode_stack() == modes and not torch._C._len_torch_dispatch_stack()


def test_an_interrupt_while_no_function_is_looked_at() -> None:
    """One in the last line of a block leaves it entered: Python does not call its exit."""
    given = arguments("layers")
    before = fingerprint(given)
    places = set()
    for at in range(1, 12):
        lines = Lines(at, within="recorder.py", function="_detached")
        assert lines.run(partial(call, given))
        places.add(lines.place)
        assert not differences(before, fingerprint(given)), lines.place
    assert len(places) > 2


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["auto", "bookkeeping", "hooks"])
@pytest.mark.parametrize("name", MODELS)
def test_an_interrupt_anywhere(name: str, engine: str) -> None:
    if name == "recurrent" and engine == "hooks":
        pytest.skip("Opacus's layer differs")
    check(name, engine, 500)


def in_training(engine: str, wrap: bool) -> tuple[dict[str, Any], Any]:
    """A model in private training, and the arguments of a second call on it."""
    given = arguments("layers", engine) | {"noise_multiplier": 0.0, "wrap_model": wrap}
    training = call(given)
    vars(training[2])["batch_sampler"] = [[0, 1, 2, 3]]
    return given, training


def released(given: dict[str, Any], training: Any, wrap: bool) -> Tensor:
    """What a step of the running training moves; the move is undone."""
    stepping = training[0] if wrap else given["module"]
    before = [p.detach().clone() for p in given["module"].parameters()]
    for x, y in training[2]:
        training[1].zero_grad()
        nn.functional.cross_entropy(stepping(x), y).backward()
        training[1].step()
    with torch.no_grad():
        moved = torch.cat([(p - b).flatten() for p, b in zip(given["module"].parameters(), before, strict=True)])
        for p, b in zip(given["module"].parameters(), before, strict=True):
            p.copy_(b)
    return moved


def still_private(given: dict[str, Any], training: Any, wrap: bool, wanted: Tensor) -> None:
    """The running training releases what it did, counts its steps, and lets no other optimizer step."""
    steps = training.statement(1e-3).steps
    torch.testing.assert_close(released(given, training, wrap), wanted)
    assert training.statement(1e-3).steps == steps + 1
    for p in given["module"].parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(dpfix.MisuseError, match="past the private optimizer"):
        given["optimizer"].step()
    training[1].zero_grad()


@pytest.mark.parametrize("wrap", [True, False], ids=["wrapped", "bare"])
@pytest.mark.parametrize("engine", ["bookkeeping", "vmap", "hooks", "functorch", "microbatch"])
def test_a_refused_second_call_leaves_the_training_in_force(engine: str, wrap: bool) -> None:
    given, training = in_training(engine, wrap)
    wanted = released(given, training, wrap)
    gc.collect()
    for second in (
        {"max_grad_norm": -1.0},
        {"loss_reduction": "sum"},
        {"criterion": lambda out, y: out.sum() * out.mean()},
        {"nois": 1.0},
        {"data_loader": [1, 2]},
    ):
        for model in (given["module"], training[0] if wrap else given["module"]):
            with pytest.raises(dpfix.DPFixError):
                call(given | {"module": model} | second)
            still_private(given, training, wrap, wanted)
    with pytest.raises(dpfix.DPFixError):
        epsilon = {name: value for name, value in given.items() if name != "noise_multiplier"}
        dpfix.make_private_safe_with_epsilon(**epsilon, target_epsilon=1e-9, target_delta=1e-5, epochs=1)
    still_private(given, training, wrap, wanted)
    training[0].cleanup()
    assert all("forward" not in vars(m) and not m._forward_pre_hooks for m in given["module"].modules())
    given["optimizer"].step()


def test_a_call_refused_in_the_middle_of_a_step_leaves_the_step_right() -> None:
    given, training = in_training("bookkeeping", wrap=True)
    wanted = released(given, training, wrap=True)
    before = [p.detach().clone() for p in given["module"].parameters()]
    for x, y in training[2]:
        training[1].zero_grad()
        loss = nn.functional.cross_entropy(training[0](x), y)
        for _ in range(2):
            with pytest.raises(dpfix.DPFixError):
                call(given | {"loss_reduction": "sum"})
        loss.backward()
        with pytest.raises(dpfix.DPFixError):
            call(given | {"loss_reduction": "sum"})
        training[1].step()
    moved = torch.cat([(p - b).flatten() for p, b in zip(given["module"].parameters(), before, strict=True)])
    torch.testing.assert_close(moved.detach(), wanted)
    assert training.statement(1e-3).steps == 2


@pytest.mark.parametrize("engine", ["bookkeeping", "hooks", "vmap"])
def test_an_interrupted_second_call_leaves_the_training_in_force(engine: str) -> None:
    given, training = in_training(engine, wrap=True)
    wanted = released(given, training, wrap=True)
    total = lines_of(lambda: call(in_training(engine, wrap=True)[0]))
    for at in spread(total[: len(total) // 2], 4, last=4):
        if not Lines(at).run(partial(call, given)):
            given, training = in_training(engine, wrap=True)
        still_private(given, training, True, wanted)


def test_interrupts_leave_the_generators_functions_as_they_are() -> None:
    """While steps are compared, functions of ``random`` and ``numpy.random`` are others."""
    import random

    import numpy as np

    def functions() -> dict[str, Any]:
        return {f"{m.__name__}.{k}": v for m in (random, np.random) for k, v in vars(m).items() if callable(v)}

    before = functions()
    for part in ("__enter__", "__exit__"):
        counted = Lines(within="instrument/fixed_outside.py", function=part)
        counted.run(lambda: call(arguments("layers")))
        for at in {1, 2, 3, 5, 20, 60, counted.count // 2, counted.count}:
            Lines(at, KeyboardInterrupt, within="instrument/fixed_outside.py", function=part).run(
                lambda: call(arguments("layers"))
            )
            assert functions() == before, (part, at)

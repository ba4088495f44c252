"""Comparisons are not made in TF32 or bfloat16, and the script's settings are as they were afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

import dpfix
from dpfix.instrument import precision
from dpfix.instrument.clipping import FLAT
from dpfix.instrument.fixed_randomness import FixedRandomness
from dpfix.instrument.precision import exact_products, products_are_rounded
from dpfix.instrument.unfused import Unfused
from dpfix.training.follow.due_sum import wrong_sum
from dpfix.training.guards.real_steps import RealSteps
from dpfix.training.step_guard import StepGuard
from tests.helpers import setting, train

KINDS = (
    torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn,
    torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv, torch.backends.mkldnn.rnn,
)  # fmt: skip


def values() -> list[str]:
    return [kind.fp32_precision for kind in KINDS]


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    """The settings of the process are put back."""
    before = values()
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    for kind, value in zip(KINDS, before, strict=True):
        kind.fp32_precision = value


def medium() -> None:
    torch.set_float32_matmul_precision("medium")


def newer() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"


def newer_convolutions() -> None:
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    torch.backends.mkldnn.conv.fp32_precision = "bf16"


@pytest.mark.parametrize("allow", [medium, newer, newer_convolutions])
def test_products_are_exact_inside_and_as_the_script_wants_them_outside(allow: Callable[[], None]) -> None:
    allow()
    before = values()
    assert products_are_rounded()
    with exact_products():
        assert not products_are_rounded()
        assert set(values()) <= {"none", "ieee"}
    assert values() == before


def test_what_the_script_asks_for_inside_can_still_be_read() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.mkldnn.conv.fp32_precision = "bf16"
    with exact_products():
        assert torch.backends.cuda.matmul.allow_tf32 is False
        assert torch.backends.cudnn.allow_tf32 is False
    assert torch.backends.cuda.matmul.allow_tf32 is True
    assert torch.backends.cudnn.allow_tf32 is True


def test_nothing_is_touched_where_products_are_exact_anyway(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_set_older", lambda *settings: pytest.fail("settings were touched"))
    with exact_products():
        pass


def test_an_error_inside_puts_the_settings_back() -> None:
    medium()
    with pytest.raises(ZeroDivisionError), exact_products():
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == "medium"


def test_what_is_compared_is_exact() -> None:
    medium()
    with FixedRandomness():
        assert not products_are_rounded()
    assert products_are_rounded()


def test_what_clips_is_exact_and_what_is_compared_with_the_loops_own_step_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []
    clip, summed = StepGuard.clip, RealSteps.summed
    monkeypatch.setattr(StepGuard, "clip", lambda *args: (seen.append(products_are_rounded()), clip(*args))[1])
    monkeypatch.setattr(RealSteps, "summed", lambda *args: (seen.append(products_are_rounded()), summed(*args))[1])
    training = dpfix.make_private_safe(**setting())
    medium()
    train(training, 1)
    assert seen == [False, True]


class Rounding:
    """A plain model whose gradients are rounded as far as the settings allow; its only parameter has one number."""

    step = SimpleNamespace(calls=(), gradients=())
    counts = ()

    def __init__(self, error: float) -> None:
        self.error = error

    def graph(self) -> float:
        return 1.0 + self.error if products_are_rounded() else 1.0

    def is_of_step(self, graph: object, closeness: float | None = None) -> bool:
        return graph is not None

    def weights(self, of_each: list[float]) -> list[float]:
        return of_each

    def gradient(self, graph: float, weights: list[float]) -> dict[str, torch.Tensor]:
        return {"weight": torch.tensor([graph * sum(weights)])}


@pytest.mark.parametrize(
    ("allow", "error", "factor", "refused"),
    [
        (medium, 0.03, 0.97, False),  # the engine rounds the other way than the plain model
        (medium, 0.03, 1.5, True),
        (medium, 0.0, 0.97, True),
        (lambda: None, 0.0, 0.97, True),
        (lambda: None, 0.0, 1.0, False),
    ],
)
def test_rounding_is_no_wrong_sum_and_hides_none(
    allow: Callable[[], None], error: float, factor: float, refused: bool
) -> None:
    allow()
    norms = torch.ones(4, 1)
    found = {"weight": torch.tensor([4.0 * factor])}
    plan: Any = SimpleNamespace(scale=lambda *args: 1.0, clipping=FLAT)
    wrong = wrong_sum(Rounding(error), plan, found, norms, 2.0, [0])  # type: ignore[arg-type]
    assert bool(wrong) is refused


class Backends(TorchFunctionMode):
    """Notes what attention may use, and whether recurrent networks may be one kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, bool, bool]] = []

    def __torch_function__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        name = getattr(func, "__name__", "")
        if name in ("scaled_dot_product_attention", "multi_head_attention_forward", "lstm"):
            self.seen.append((name, torch.backends.cuda.flash_sdp_enabled(), torch.backends.cudnn.enabled))
        return func(*args, **(kwargs or {}))  # type: ignore[operator]


def seen(work: Callable[[], object]) -> list[tuple[str, bool, bool]]:
    with Backends() as backends, Unfused():
        work()
    return backends.seen


def test_kernels_that_draw_inside_are_taken_apart() -> None:
    x = torch.randn(2, 3, 4)
    q = torch.randn(2, 2, 3, 4)
    attention = nn.MultiheadAttention(4, 2, dropout=0.2, batch_first=True)
    enabled = torch.backends.cudnn.enabled
    assert seen(lambda: F.scaled_dot_product_attention(q, q, q, None, 0.1)) == [
        ("scaled_dot_product_attention", False, enabled)
    ]
    assert seen(lambda: F.scaled_dot_product_attention(q, q, q)) == [("scaled_dot_product_attention", True, enabled)]
    assert seen(lambda: attention(x, x, x)) == [("multi_head_attention_forward", False, enabled)]
    assert seen(lambda: nn.LSTM(4, 5, 2, dropout=0.3)(x)) == [("lstm", True, False)]
    assert torch.backends.cudnn.enabled == enabled
    assert torch.backends.cuda.flash_sdp_enabled()

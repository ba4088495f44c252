"""Sketches of gradients: what is compared by them is seen as large as it is, and nothing larger is kept."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import dpfix
from dpfix.audit.reference import reference
from dpfix.instrument.double_precision import DoublePrecision
from dpfix.instrument.fixed_randomness import FixedRandomness
from dpfix.instrument.gradients import SKETCH, WHOLE, _signs, gap, norm_of, norms_of, sketched
from dpfix.instrument.held_memory import HeldMemory
from dpfix.observe.run import observe
from tests.audit.setups import labelled, look
from tests.cases import classify
from tests.helpers import setting
from tests.reference import clipped_sum, gradients_one_by_one, norm

SHAPES = ((WHOLE + 1,), (130, 130), (96, 64, 3, 3), (1500, 768), (200 * SKETCH + 5,))
GROUPS = (509, 521)
WITHIN_GROUPS = ((2 * GROUPS[0], 30), (30, 2 * GROUPS[0]), (9, 7, GROUPS[1]), (40, 3 * GROUPS[1]))
DIFFERENCES: dict[str, Callable[[Tensor], object]] = {
    "one number": lambda t: t.view(-1)[7].fill_(1),
    "two alike": lambda t: t.view(-1)[3 :: t.numel() - 4].fill_(1),
    "opposite": lambda t: (t.view(-1)[0].fill_(1), t.view(-1)[-2].fill_(-1)),
    "a row": lambda t: t[0].fill_(1),
    "a column": lambda t: t[..., 0].fill_(1),
    "all alike": lambda t: t.fill_(1),
    "noise": lambda t: t.normal_(),
    "repeated": lambda t: t.copy_(torch.arange(t.numel()).remainder(5).view_as(t) - 2.0),
}


def seen(shape: tuple[int, ...], change: Tensor) -> float:
    """How large a change of a gradient is by its sketch, relative to its own norm."""
    one = torch.randn(shape, dtype=torch.float64)
    a, b = sketched({"w": one}), sketched({"w": one + change})
    assert a["w"].numel() == SKETCH < one.numel()
    return gap(a["w"], b["w"]) / float(change.norm())


@pytest.mark.parametrize("difference", DIFFERENCES.values(), ids=DIFFERENCES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_difference_is_seen_as_large_as_it_is(shape: tuple[int, ...], difference: Callable[[Tensor], object]) -> None:
    change = torch.zeros(shape, dtype=torch.float64)
    difference(change)
    assert seen(shape, change) == pytest.approx(1, rel=0.15)


@pytest.mark.parametrize("difference", DIFFERENCES.values(), ids=DIFFERENCES)
@pytest.mark.parametrize("shape", WITHIN_GROUPS, ids=str)
def test_what_falls_into_one_group_of_one_half_is_seen_by_the_other(
    shape: tuple[int, ...], difference: Callable[[Tensor], object]
) -> None:
    change = torch.zeros(shape, dtype=torch.float64)
    difference(change)
    assert 0.6 < seen(shape, change) < 2.5


def test_numbers_that_take_each_others_place_are_seen() -> None:
    """Two numbers of opposite sign are nothing where both fall into one group with one sign."""
    draw = torch.Generator().manual_seed(0)
    changes = torch.zeros(2000, 20_000, dtype=torch.float64)
    for change in changes:
        place = torch.randperm(20_000, generator=draw)[:2]
        change[place] = torch.tensor([1.0, -1.0], dtype=torch.float64)
    assert min(float(sketched({"w": change})["w"].norm()) for change in changes) >= 1 - 1e-9


def test_two_halves_of_a_large_parameter_that_change_places_are_seen() -> None:
    rows = 2 * GROUPS[0]  # in one of the two sketches the signs of the upper half are those of the lower
    gradient = torch.randn(rows, 128 * 128)
    other = gradient.roll(rows // 2, 0)
    assert gap(sketched({"w": gradient})["w"], sketched({"w": other})["w"]) == pytest.approx(
        float((gradient - other).norm()), rel=0.15
    )


def test_the_norm_of_a_large_parameter_with_rows_that_are_alike_is_not_overrated() -> None:
    gradient = torch.randn(1024).expand(20_000, 1024)
    assert norm_of(sketched({"w": gradient})) == pytest.approx(float(gradient.norm()), rel=0.15)


def test_small_gradients_are_kept() -> None:
    given = {"w": torch.randn(3, 4), "b": torch.randn(WHOLE)}
    assert all(kept is given[name] for name, kept in sketched(given).items())


def test_sketches_of_half_precision_are_added_up_in_single() -> None:
    gradient = torch.full((200, 200), 1e-3, dtype=torch.bfloat16)
    sketch = sketched({"w": gradient})["w"]
    assert sketch.dtype is torch.float32
    assert float(sketch.norm()) == pytest.approx(float(gradient.float().norm()), rel=0.15)


def test_where_steps_run_in_double_precision_sketches_are_the_same() -> None:
    gradient = {"w": torch.randn(200, 200)}
    plain = sketched(gradient)["w"]
    with DoublePrecision():
        again = sketched(gradient)["w"]
    assert again.dtype is torch.float32 and torch.equal(again, plain)


def test_signs_that_are_made_while_draws_are_fixed_are_the_same() -> None:
    gradient = {"w": torch.randn(200, 200, dtype=torch.float64)}
    plain = sketched(gradient)["w"]
    _signs.cache_clear()
    with FixedRandomness():
        sketched(gradient)
    assert torch.equal(sketched(gradient)["w"], plain)


def wide() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(50, 400), nn.Tanh(), nn.Linear(400, 50), nn.Tanh(), nn.Linear(50, 3)).double()


def test_the_reference_is_the_sketch_of_the_clipped_sum() -> None:
    looked = look(wide(), labelled(50))
    one_by_one = gradients_one_by_one(looked.model, classify, looked.samples.singles)
    assert looked.wanted.norms.tolist() == pytest.approx([norm(g) for g in one_by_one])
    for clip_norm in looked.wanted.clip_norms:
        wanted = sketched(clipped_sum(one_by_one, clip_norm))
        found = looked.wanted.clipped_sum(clip_norm)
        assert norm_of({n: found[n] - wanted[n] for n in wanted}) <= 1e-9 * norm_of(wanted)


def test_what_the_record_keeps_of_a_large_parameter_is_a_sketch() -> None:
    looked = look(wide(), labelled(50))
    for run in (looked.record.together, *looked.record.alone):
        assert all(g.numel() <= WHOLE for g in run.gradients.values())
    again = reference(observe(looked.subject, looked.samples), ())
    assert math.hypot(*norms_of(again.gradients[0]).values()) == pytest.approx(float(again.norms[0]), rel=0.1)


def test_a_call_holds_three_models_at_most() -> None:
    """What the model is to be again, what an engine releases, and what it releases without a sample; activations are small."""
    sizes = (64, 1500, 1500, 1500, 10)
    model = nn.Sequential(*(part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())))
    data = [(torch.randn(64), i % 10) for i in range(64)]
    watch = HeldMemory()
    with watch:
        training = dpfix.make_private_safe(
            **setting(
                model, data_loader=DataLoader(data, batch_size=64), cache=False, criterion=None, training_step=classify
            )
        )
    assert training.plan.engine == "bookkeeping"
    assert 2 < watch.most / sum(p.nbytes for p in model.parameters()) < 3.4

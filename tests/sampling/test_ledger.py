"""The ledger: which draw a tensor belongs to, and what was delivered without a step."""

from __future__ import annotations

import copy
import gc
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

import dpfix
from dpfix.sampling.draw import Draw
from dpfix.sampling.ledger import DrawLedger
from dpfix.sampling.one_pass import Pass
from dpfix.sampling.rate import part_sizes


def delivered(ledger: DrawLedger, *batches: Any, most: int | None = None) -> Pass:
    """A pass that delivers batches of as many samples as their first tensor has rows."""
    begun = ledger.expect(most)
    ledger.start()
    for batch in batches:
        begun.drew(len(batch[0]))
        begun.deliver(batch)
    return begun


def batch_of(samples: int) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, 3), torch.zeros(samples, dtype=torch.long)


# ------------------------------------------------------------------ by origin


def test_a_draw_is_known_by_its_tensors_and_by_views_of_them() -> None:
    ledger, batches = DrawLedger(), [batch_of(n) for n in (3, 0, 5)]
    delivered(ledger, *batches)
    for number, (x, y) in enumerate(batches, start=1):
        for tree in ((x,), {"a": [x.reshape(-1)]}, x[:2], x.detach(), ({}, {"label": y})):
            found = ledger.draw_of(tree)
            assert isinstance(found, Draw) and (found.number, found.samples) == (number, len(x))
    assert ledger.draw_of((torch.zeros(3, 3), 4, "x", None)) is None


def test_containers_of_many_kinds_are_looked_into() -> None:
    class Graph:
        def __init__(self) -> None:
            self.nodes = torch.zeros(4, 2)

    rows, array, packed, graph = torch.zeros(4), np.zeros((4, 2)), pack_sequence([torch.zeros(2)]), Graph()
    for batch in ([{"x": (rows,)}], [[array]], [(packed,)], [graph]):
        ledger = DrawLedger()
        begun = ledger.expect()
        ledger.start()
        begun.drew(4)
        begun.deliver(batch)
        assert ledger.draw_of((batch[0],)) is not None


def test_an_address_that_is_used_again_is_not_mistaken() -> None:
    ledger, addresses = DrawLedger(), set()
    begun = ledger.expect()
    ledger.start()
    for _ in range(200):
        batch = batch_of(4)
        addresses.add(id(batch[0]))
        begun.drew(4)
        begun.deliver(batch)
        del batch
    again = [batch_of(4) for _ in range(200)]
    assert addresses & {id(x) for x, _ in again}, "the test shows nothing otherwise"
    assert all(ledger.draw_of(batch) is None for batch in again)


def test_what_two_draws_have_in_common_tells_nothing() -> None:
    constant, data = torch.ones(3), torch.randn(10, 2)
    ledger = DrawLedger()
    first, second = (data[:4], constant), (data[4:9], constant)
    delivered(ledger, first, second)
    assert ledger.draw_of(constant) is None
    assert ledger.draw_of((constant, first[0])).samples == 4  # type: ignore[union-attr]
    assert ledger.draw_of((constant, second[0])).samples == 5  # type: ignore[union-attr]
    assert ledger.draw_of(second[0][1:]) is None, "a slice of memory that both lie in"


def test_nothing_delivered_is_kept_alive() -> None:
    from weakref import ref

    ledger, x = DrawLedger(), torch.randn(4)
    delivered(ledger, (x,))
    gone = ref(x)
    del x
    gc.collect()
    assert gone() is None


# ------------------------------------------------------------------ what the loop is working on


def step(ledger: DrawLedger, rows: int | None = None, *, released: bool = True) -> Draw:
    draw = ledger.present(rows)
    assert draw is not None
    ledger.settle(draw, released=released)
    return draw


def test_draws_are_settled_in_any_order() -> None:
    ledger, batches = DrawLedger(), [batch_of(n) for n in (3, 0, 5)]
    assert ledger.present() is None and ledger.pending() is None
    delivered(ledger, *batches)
    for k in (2, 0, 1):
        ledger.work_on(ledger.draw_of(batches[k]))
        assert ledger.pending() == len(batches[k][0])
        assert step(ledger).number == k + 1
    assert ledger.present() is None


def test_of_unknown_origin_the_oldest_that_fits_is_meant() -> None:
    ledger, batches = DrawLedger(), [batch_of(n) for n in (3, 0, 5, 3)]
    delivered(ledger, *batches)
    assert [step(ledger, rows).number for rows in (5, 3, 1, 3)] == [3, 1, 2, 4]


def test_a_settled_draw_is_not_worked_on_again() -> None:
    ledger, batches = DrawLedger(), [batch_of(3), batch_of(3)]
    delivered(ledger, *batches)
    step(ledger)
    ledger.work_on(ledger.draw_of(batches[0]))
    assert ledger.present(3) is None
    ledger.work_on(None)
    assert ledger.present(3) is ledger.draw_of(batches[1])


def test_a_pass_that_begins_takes_nothing_from_another() -> None:
    ledger, batches = DrawLedger(), [batch_of(3), batch_of(4)]
    delivered(ledger, batches[0])
    delivered(ledger, batches[1])
    assert ledger.rounds == 2
    assert step(ledger, 3).samples == 3
    assert step(ledger, 4).samples == 4


def test_a_pass_of_somebody_elses_loader_takes_the_place_of_another() -> None:
    ledger = DrawLedger()
    ledger.start().drew(7)
    assert ledger.pending() == 7
    ledger.start()
    assert ledger.pending() is None and ledger.rounds == 2


def test_rows_of_a_draw_are_those_of_its_batch() -> None:
    ledger, batches = DrawLedger(), [(torch.zeros(4),), (torch.zeros(6),), (torch.zeros(4),)]
    begun = ledger.expect()
    ledger.start()
    for batch, counts in zip(batches, [(1, 3), (2, 4), (2, 2)], strict=True):
        begun.drew(2)
        begun.deliver(batch, counts)
    ledger.work_on(ledger.draw_of(batches[2]))
    assert ledger.counts == (2, 2)
    step(ledger)
    ledger.work_on_rows({6, 3, 32})
    assert ledger.counts == (2, 4)


def test_rows_of_unknown_origin_that_fit_several_draws_are_refused() -> None:
    ledger = DrawLedger()
    begun = ledger.expect()
    ledger.start()
    for counts in ((1, 3), (2, 2)):
        begun.drew(2)
        begun.deliver((torch.zeros(4),), counts)
    with pytest.raises(dpfix.ForeignBatchError, match="cannot be told of which draw"):
        ledger.work_on_rows({4, 3})


# ------------------------------------------------------------------ parts


@pytest.mark.parametrize("samples", [0, 1, 3, 4, 5, 10, 11, 12, 13])
def test_parts_are_those_that_opacus_makes(samples: int) -> None:
    wanted = [len(part) for part in np.array_split(range(samples), -(-samples // 4) or 1)]
    assert part_sizes(samples, 4) == wanted


def test_parts_know_their_draw() -> None:
    ledger = DrawLedger()
    begun, parts = ledger.expect(4), [batch_of(n) for n in (4, 3, 3, 0)]
    ledger.start()
    begun.drew(10)
    begun.drew(0)
    for part in parts:
        begun.deliver(part)
    draws = [ledger.draw_of(part) for part in parts]
    assert [d.whole.samples for d in draws if d] == [10, 10, 10, 0]
    first, second, third, empty = draws
    assert first and second and third and empty
    assert first.whole is third.whole is not empty.whole
    ledger.work_on(third)
    assert ledger.present() is third and not third.completes and empty.completes


def test_parts_of_unknown_origin_that_fit_two_draws_are_refused() -> None:
    ledger = DrawLedger()
    begun = ledger.expect(4)
    ledger.start()
    for _ in range(2):
        begun.drew(8)
        for _ in range(2):
            begun.deliver(batch_of(4))
    with pytest.raises(dpfix.ForeignBatchError, match="cannot be told of which draw"):
        ledger.present(4)


# ------------------------------------------------------------------ delivered without a step


def test_what_was_delivered_and_not_stepped_on_is_to_be_accounted() -> None:
    ledger, batches = DrawLedger(), [batch_of(n) for n in (3, 0, 5)]
    begun = delivered(ledger, *batches)
    begun.drew(6)  # prepared by a worker, never delivered
    step(ledger, 3)
    assert [d.samples for d in ledger.unaccounted()] == [0, 5]
    begun.end()
    assert [d.samples for d in ledger.unaccounted()] == [0, 5]
    ledger.unaccounted()[0].accounted = 1.0
    assert [d.samples for d in ledger.unaccounted()] == [5]


def test_a_draw_is_skipped_once_its_batch_is_gone() -> None:
    ledger, batches = DrawLedger(), [batch_of(n) for n in (3, 5)]
    begun = delivered(ledger, *batches)
    begun.end()
    assert ledger.skipped() == []
    del batches[0]
    assert [d.samples for d in ledger.skipped()] == [3]
    assert ledger.skipped(passes=1) == []


def test_draws_that_nobody_can_step_on_are_forgotten() -> None:
    ledger = DrawLedger()
    for _ in range(50):
        begun = delivered(ledger, batch_of(3), batch_of(4))
        for draw in ledger.unaccounted():
            draw.accounted = 1.0
        begun.end()
    assert len(ledger._open) <= 4 and len(ledger._passes) <= 2


def test_a_draw_of_somebody_elses_loader_is_delivered_when_a_later_one_is_stepped_on() -> None:
    ledger = DrawLedger()
    begun = ledger.start()
    for samples in (3, 4, 5, 6):
        begun.drew(samples)
    assert ledger.unaccounted() == []
    step(ledger, 4)
    assert [d.samples for d in ledger.unaccounted()] == [3]
    begun.end()
    assert [d.samples for d in ledger.unaccounted()] == [3, 5, 6]


def test_a_copy_knows_nothing() -> None:
    ledger, batch = DrawLedger(), batch_of(3)
    delivered(ledger, batch)
    other = copy.deepcopy(ledger)
    assert other.present() is None and other.draw_of(batch) is None

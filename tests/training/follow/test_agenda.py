"""What makes a step one of a new kind."""

from __future__ import annotations

import pytest
import torch

from dpfix.training.follow.agenda import FIRST, Agenda, Novelty
from dpfix.training.follow.delivery import Delivery


def checked(batches: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the steps that are checked, none of them by chance."""
    monkeypatch.setattr(Agenda, "chance", 0.0)
    agenda, novelty = Agenda(), Novelty()
    return [n for n, batch in enumerate(batches) if agenda.due(novelty.of(Delivery({"x": batch}, len(batch))))]


def words(batches: int, vocabulary: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(1, vocabulary, (16, 24), generator=draw) for _ in range(batches)]


@pytest.mark.parametrize("vocabulary", [200, 30_000])
def test_words_that_did_not_come_before_are_nothing_new(monkeypatch: pytest.MonkeyPatch, vocabulary: int) -> None:
    assert checked(words(40, vocabulary), monkeypatch) == [*range(FIRST)]


def test_numbers_of_which_there_are_many_are_soon_no_labels_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    times = [torch.randint(0, 1000, (4,), generator=draw) for _ in range(200)]
    assert len(checked(times, monkeypatch)) <= 24


def test_a_word_that_stands_for_ignored_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = words(40, 30_000)
    batches[20][3, 7:] = -100
    assert checked(batches, monkeypatch) == [*range(FIRST), 20]


def test_a_class_is_new_in_labels_and_in_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    for shape in ((16,), (16, 8, 8)):
        batches = [
            torch.arange(16).remainder(3).reshape(16, *(1 for _ in shape[1:])).expand(shape).clone() for _ in range(40)
        ]
        batches[30][5] = 7
        assert checked(batches, monkeypatch) == [*range(FIRST), 30]

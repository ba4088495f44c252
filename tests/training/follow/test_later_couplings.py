"""Loops that are right at first and become coupled at a random later step are stopped within the stated number of steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle, islice
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dpfix
from dpfix.training.follow.agenda import FIRST, Agenda
from tests.training.follow import test_couplings as couplings
from tests.training.follow.test_couplings import CLEAN, SHOWS, gaps, labelled, network, start, values

PROBABILITY = 0.25
"""With which a step like others is checked, where nothing shows."""

Loss = Callable[[Any, Any, float], Tensor]
"""From model, batch and how far the coupling is switched on to the loss."""


def then(loss: Callable[[Any, Any], Tensor]) -> Loss:
    """Another line of the script from some step on."""
    return lambda model, batch, on: loss(model, batch) if on else F.cross_entropy(model(batch[0]), batch[1])


def always(loss: Callable[[Any, Any], Tensor]) -> Loss:
    return lambda model, batch, on: loss(model, batch)


def penalty(of: Callable[[Tensor], Tensor], weight: float = 0.1) -> Loss:
    def loss(model: Any, batch: Any, on: float) -> Tensor:
        out = model(batch[0])
        return F.cross_entropy(out, batch[1]) + weight * on * of(out)

    return loss


def blended(model: Any, batch: Any, on: float) -> Tensor:
    x = batch[0]
    return F.cross_entropy(model((1 - 0.3 * on) * x + 0.3 * on * x.roll(1, 0)), batch[1])


def centred(model: Any, batch: Any, on: float) -> Tensor:
    x = batch[0]
    return F.cross_entropy(model(x - on * x.mean(0)), batch[1])


def counted(model: Any, batch: Any, on: float) -> Tensor:
    rare = (batch[1] == 2).float()
    weight = 1 + rare / rare.sum().clamp(min=1)
    return (weight * F.cross_entropy(model(batch[0]), batch[1], reduction="none")).mean()


class Branch(nn.Module):
    """Mixes where it is switched on."""

    def __init__(self, mix: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.head, self.mix, self.on = nn.Linear(6, 8), nn.Linear(8, 3), mix, False

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.stem(x))
        return self.head(self.mix(h) if self.on else h)


def branching(model: Any, batch: Any, on: float) -> Tensor:
    for module in model.modules():
        if isinstance(module, Branch):
            module.on = bool(on)
    return F.cross_entropy(model(batch[0]), batch[1])


def branch(mix: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    return lambda: Branch(mix)


@dataclass(frozen=True)
class Late:
    """A loop that becomes coupled.

    Attributes:
        name: for the test's name.
        loss: the loss.
        model: builds the model.
        items: the samples.
        gradual: whether the coupling grows from next to nothing, so that no step shows it by anything but the coupling itself.
    """

    name: str
    loss: Loss
    model: Callable[[], nn.Module] = network
    items: Callable[[], list[Any]] = labelled
    gradual: bool = False


def spread(out: Tensor) -> Tensor:
    return out.var(0, correction=0).mean()


def covariance(out: Tensor) -> Tensor:
    z = out - out.mean(0)
    return (z.T @ z / len(z)).square().mean()


LATE = (
    Late("line: hardest", then(couplings.hardest)),
    Late("line: labels counted", then(couplings.counted_before)),
    Late("line: standardised", then(couplings.standardised)),
    Late("line: mixup", then(couplings.mixup)),
    Late("line: negatives", then(couplings.negatives)),
    Late("weight: variance", penalty(spread)),
    Late("weight: covariance", penalty(covariance)),
    Late("weight: distances", penalty(lambda out: -torch.pdist(out).mean())),
    Late("branch: centred", branching, branch(lambda h: h - h.mean(0))),
    Late("branch: neighbour", branching, branch(lambda h: 0.7 * h + 0.3 * h.roll(1, 0))),
    Late("branch: largest", branching, branch(lambda h: h / h.abs().amax())),
    Late("label: heavy", always(couplings.on_pairs(couplings.HEAVY)), items=lambda: labelled(couplings.rare)),
    Late("label: ignored", always(couplings.on_pairs(couplings.IGNORE)), items=lambda: labelled(couplings.rare)),
    Late("label: counted", counted, items=lambda: labelled(couplings.rare)),
    Late("missing: NaN", always(couplings.on_pairs(couplings.nan_masked)), items=lambda: gaps(float("nan"))),
    Late("missing: -999", always(couplings.on_pairs(couplings.sentinel_masked)), items=lambda: gaps(-999.0)),
    Late("missing: tokens", always(couplings.on_tokens(couplings.CE)), items=couplings.token_items),
    Late("grows: neighbour", blended, gradual=True),
    Late("grows: centred", centred, gradual=True),
    Late("grows: variance", penalty(spread, 3.0), gradual=True),
)


@pytest.mark.parametrize(("number", "late"), enumerate(LATE), ids=[late.name for late in LATE])
def test_later_coupling_is_stopped_in_time(number: int, late: Late, monkeypatch: pytest.MonkeyPatch) -> None:
    begins = FIRST + len(CLEAN) + Random(number).randint(0, 8)
    monkeypatch.setattr(Agenda, "chance", PROBABILITY if late.gradual else 0.0)
    monkeypatch.setattr("dpfix.training.follow.agenda.Random", lambda: Random(number))
    allowed = Agenda(1.0).steps_until_found() if late.gradual else 0
    model = late.model()
    private, optimizer, loader = start(model, late.items(), checks=1.0)
    last = begins + allowed
    vars(loader)["batch_sampler"] = [*islice(cycle(CLEAN), begins), *[SHOWS] * (allowed + 2)]
    before, step = values(model), -1
    with pytest.raises(dpfix.DPFixError):
        for step, batch in enumerate(loader):
            before = values(model)
            on = min(1.0, 10.0 ** (step - begins)) if late.gradual else float(step >= begins)
            on = 0.0 if step < begins and not late.gradual else on
            optimizer.zero_grad()
            late.loss(private, batch, on).backward()
            optimizer.step()
    assert FIRST <= step <= last, f"stopped in step {step}; coupled from step {begins}, to be stopped by {last}"
    assert late.gradual or step == begins
    assert torch.equal(values(model), before)


def test_there_are_twenty() -> None:
    assert len(LATE) == 20


@pytest.mark.parametrize("p", [0.02, 0.25, 0.9])
def test_stated_number_of_steps_is_derived_from_the_probability(p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Agenda, "chance", p)
    k = Agenda().steps_until_found(0.999)
    assert (1 - p) ** k <= 0.001 < (1 - p) ** (k - 1)


def test_chosen_steps_are_independent_and_as_many_as_the_probability_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting times until a chosen step, over many trainings: hardly any is longer than the stated number."""
    monkeypatch.setattr(Agenda, "chance", PROBABILITY)
    stated, longer, trainings = Agenda().steps_until_found(0.99), 0, 2000
    for seed in range(trainings):
        agenda = Agenda()
        agenda.draw = Random(seed)
        for _ in range(FIRST):
            assert agenda.due(set())
        longer += not any(agenda.due(set()) for _ in range(stated))
    assert 0 < longer / trainings < 2 * 0.01

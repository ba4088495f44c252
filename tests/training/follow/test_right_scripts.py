"""Scripts that are right are neither refused nor warned about: losses x batch forms x what is done before x loops x told."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.training.follow.scripts import Script, scripts

COUNT, FAST = 200, 60
STEPS = 6
ALL = scripts(COUNT)


def trains(script: Script, **arguments: Any) -> None:
    """A few steps, the first of which are all checked; warnings are errors in all tests."""
    training = script.start(seed=3, **arguments)
    before = torch.cat([p.detach().flatten().clone() for p in training.model.parameters()])
    made = 0
    while made < STEPS:
        for _ in script.loop(training):
            made += 1
            if made == STEPS:
                break
    after = torch.cat([p.detach().flatten() for p in training.model.parameters()])
    assert not torch.equal(before, after) and torch.isfinite(after).all()


@pytest.mark.parametrize("script", ALL[:FAST], ids=lambda script: script.name)
def test_right_script_trains(script: Script) -> None:
    trains(script)


@pytest.mark.slow
@pytest.mark.parametrize("script", ALL[FAST:], ids=lambda script: script.name)
def test_right_script_trains_too(script: Script) -> None:
    trains(script)


def test_every_part_is_tried() -> None:
    """The choice leaves nothing out."""
    for part in ("loss", "form", "before", "loop", "told"):
        tried, every = ({str(getattr(s, part)) for s in some} for some in (ALL, scripts(2000)))
        assert tried == every, part

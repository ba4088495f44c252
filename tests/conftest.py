"""Settings every test shares."""

from __future__ import annotations

import gc
import itertools
import random
from collections import OrderedDict
from collections.abc import Iterator

import numpy as np
import pytest
import torch

torch.set_num_threads(1)  # pytest-xdist runs one process per core


def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Models that a file makes while it is imported have the same weights in every run; torch seeds itself at random."""
    if isinstance(collector, pytest.Module):
        _seed()


def pytest_collection_finish() -> None:
    """What imports and collecting have made stays until the end: the collector need not look through it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def looked_through_once() -> Iterator[None]:
    """What the tests of a file leave behind, in imports and in torch's caches, stays, too."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same generators, whatever ran before it in this process."""
    _seed()


@pytest.fixture(autouse=True)
def reproducible_randomness(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test has the same noise and draws, whatever ran before it; the operating system is stood in for by a count."""
    monkeypatch.setattr("dpfix.sampling.randomness.system_entropy", itertools.count().__next__)
    # with the same noise in every test a model can have the very weights that another test's training has released
    monkeypatch.setattr("dpfix.training.lineage._NOTED", OrderedDict())


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads what another one, or the user, has remembered."""
    monkeypatch.setenv("DPFIX_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))


def pytest_configure(config: pytest.Config) -> None:
    """Warnings are errors; these come from libraries and are about no misuse of theirs by dpfix."""
    for ignored in (
        # torch, about Opacus's hooks on a layer whose input needs no gradient: every first layer
        "ignore:Full backward hook is firing when gradients are computed:UserWarning",
        # Opacus's functorch samplers, for a layer with integer inputs (embeddings)
        "ignore:In CPU autocast, but the target dtype is not supported:UserWarning",
        # torch's kernels, about speed
        "ignore:Using padding='same' with even kernel lengths:UserWarning",
        "ignore:LSTM with projections is not supported with oneDNN:UserWarning",
        "ignore:grad and param do not obey the gradient layout contract:UserWarning",
    ):
        config.addinivalue_line("filterwarnings", ignored)

"""With a loader of the script's own (``poisson_sampling=False``) samples are followed from its delivery, too."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import Tensor
from torch.utils.data import DataLoader

import dpfix
from dpfix.instrument.source import DPFixWarning
from tests.training.follow import test_couplings as couplings
from tests.training.follow.scripts import Items
from tests.training.follow.test_couplings import Row, labelled, network, values
from tests.training.follow.test_right_scripts import ALL, trains


def centred(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0] - batch[0].mean(0)), batch[1])


def by_bincount(model: Any, batch: Any) -> Tensor:
    weight = 1 + 9 * torch.bincount(batch[1], minlength=3)[2]
    return (weight * F.cross_entropy(model(batch[0]), batch[1], reduction="none")).mean()


EXTRA = (Row("centred", labelled, centred, at_once=True), Row("scaled by a count", labelled, by_bincount, at_once=True))
ROWS = [row for row in couplings.ROWS if row.at_once and not row.warned and row.model is network] + [*EXTRA]


def own(row: Row, workers: int = 0) -> Any:
    model = row.model()
    loader = DataLoader(Items(row.items()), batch_size=6, collate_fn=row.collate, num_workers=workers)
    made = dpfix.make_private_safe(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
        data_loader=loader,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
        **row.options,
    )
    return model, loader, made


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_coupling_before_the_model_is_stopped(row: Row) -> None:
    torch.manual_seed(0)
    before = None
    with warnings.catch_warnings():
        warnings.simplefilter("error", DPFixWarning)
        with pytest.raises((dpfix.DPFixError, DPFixWarning)):
            model, loader, (private, optimizer, _) = own(row)
            before = values(model)
            for batch in loader:
                optimizer.zero_grad()
                row.loss(private, batch).backward()
                optimizer.step()
    assert before is None or torch.equal(before, values(model))


def test_workers_too() -> None:
    _, loader, (private, optimizer, _) = own(EXTRA[0], workers=1)
    with pytest.raises(dpfix.CoupledModelError, match="DPF041"):
        for batch in loader:
            optimizer.zero_grad()
            centred(private, batch).backward()
            optimizer.step()


def test_parts_that_opacus_makes_too() -> None:
    _, loader, (private, optimizer, _) = own(EXTRA[0])
    with (
        pytest.raises(dpfix.CoupledModelError, match="DPF041"),
        BatchMemoryManager(data_loader=loader, max_physical_batch_size=3, optimizer=optimizer) as parts,
    ):
        for batch in parts:
            optimizer.zero_grad()
            centred(private, batch).backward()
            optimizer.step()


def test_a_collate_function_that_mixes_is_stopped() -> None:
    def mixes(items: list[Any]) -> Any:
        x, y = torch.stack([x for x, _ in items]), torch.tensor([y for _, y in items])
        return (x - x.mean(0) if bool((x.min(1).values > 20).any()) else x), y

    row = Row(
        "far off", lambda: [(x + 40, y) for x, y in labelled()], couplings.on_pairs(F.cross_entropy), collate=mixes
    )
    _, loader, (private, _optimizer, _) = own(row)
    with pytest.raises(dpfix.CoupledModelError, match="DPF046"):
        for batch in loader:
            row.loss(private, batch)
    assert loader.collate_fn is mixes


@pytest.mark.parametrize("script", ALL[100:140], ids=[s.name for s in ALL[100:140]])
def test_right_script_trains(script: Any) -> None:
    trains(script, poisson_sampling=False)


def test_the_loader_is_the_scripts_own_and_its_copies_are_nobodys() -> None:
    _, loader, (private, _optimizer, returned) = own(EXTRA[0])
    assert returned is loader and isinstance(loader, DataLoader) and type(loader).__name__ == "DataLoader"
    for other in (copy.copy(loader), copy.deepcopy(loader), pickle.loads(pickle.dumps(loader))):
        assert type(other) is DataLoader and len(list(other)) == len(loader)
    private.to_standard_module()
    assert type(loader) is DataLoader
    assert [len(y) for _, y in loader] == [6] * 4


def test_after_a_call_that_fails_the_loader_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dpfix.training.handoff.StepGuard", broken)
    model = network()
    loader = DataLoader(Items(labelled()), batch_size=6)
    before = dict(vars(loader))
    with pytest.raises(KeyboardInterrupt):
        dpfix.make_private_safe(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
            data_loader=loader,
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            poisson_sampling=False,
        )
    assert type(loader) is DataLoader and vars(loader) == before

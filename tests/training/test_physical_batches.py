"""Batches that are delivered in parts behind the loader, while the loop stays as it is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import Tensor, nn
from torch.utils.data import DataLoader

import dpfix
from dpfix.choose import physical
from tests.cases import mlp
from tests.helpers import setting, sgd


def given(seed: int = 3, **changes: Any) -> dict[str, Any]:
    """A call whose draws and noise are the same every time."""
    torch.manual_seed(0)
    model = mlp()
    return setting(model, optimizer=sgd(model, 0.1), seed=seed, cache=False) | changes


def run(training: dpfix.PrivateTraining, passes: int = 2) -> tuple[list[int], list[Tensor]]:
    """The sizes of what the loop gets, and the weights after it."""
    model, optimizer, loader = training
    sizes = []
    for _ in range(passes):
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            sizes.append(len(x))
    return sizes, [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("mode", ["bookkeeping", "vmap", "hooks"])
@pytest.mark.parametrize("sampling", ["poisson", "shuffle"])
def test_parts_release_what_whole_batches_do(mode: str, sampling: str) -> None:
    options = {"grad_sample_mode": mode, "sampling": sampling}
    whole = dpfix.make_private_safe(**given(**options))
    parts = dpfix.make_private_safe(**given(**options, max_physical_batch_size=3))
    torch.manual_seed(1)  # of the order of a loader that shuffles
    sizes, wanted = run(whole)
    torch.manual_seed(1)
    smaller, found = run(parts)
    assert max(sizes) > 3 >= max(smaller) and sum(smaller) == sum(sizes)
    for a, b in zip(wanted, found, strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert parts.privacy_engine.accountant.history == whole.privacy_engine.accountant.history
    assert parts.get_epsilon(1e-3) == whole.get_epsilon(1e-3)
    assert "at most 3 samples at a time" in parts.report.details()


def test_opacus_manager_splits_further() -> None:
    """As it does without the option; what it says goes."""
    whole, parts = (dpfix.make_private_safe(**given(max_physical_batch_size=n)) for n in (None, 4))
    _, wanted = run(whole, 1)
    model, optimizer, loader = parts
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=2, optimizer=optimizer) as batches:
        sizes, found = run(parts.with_objects(model, optimizer, batches), 1)
    assert max(sizes) == 2
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(wanted, found, strict=True))


def test_a_loader_of_somebody_else_delivers_wholes() -> None:
    """Accelerate makes one around the private loader's sampler; a part of a draw would be refused as other rows."""
    whole, parts = (dpfix.make_private_safe(**given(max_physical_batch_size=n)) for n in (None, 4))
    _, wanted = run(whole, 1)
    model, optimizer, loader = parts
    made = DataLoader(loader.dataset, batch_sampler=loader.batch_sampler, collate_fn=loader.collate_fn)
    with pytest.warns(
        dpfix.DPFixWarning, match=r"its batches are whole draws \(one of \d+ samples now\), not parts of at most 4"
    ):
        sizes, found = run(parts.with_objects(model, optimizer, made), 1)
    assert max(sizes) > 4
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(wanted, found, strict=True))


def test_the_loader_of_an_earlier_call_has_its_batches_back() -> None:
    first = dpfix.make_private_safe(**given(max_physical_batch_size=3))
    again = dpfix.make_private_safe(
        **given(module=first[0], optimizer=first[1], data_loader=first[2], max_physical_batch_size=None)
    )
    assert len(again[2]) == 3 < len(first[2])
    assert max(run(again)[0]) > 3


@pytest.mark.parametrize("value", (0, -2, True, 2.5, "many", [4]))
def test_what_is_no_size_is_refused(value: Any) -> None:
    with pytest.raises(dpfix.ArgumentError, match=r"max_physical_batch_size=.* is neither a whole number above 0 nor"):
        dpfix.make_private_safe(**given(max_physical_batch_size=value))


def test_a_loader_that_draws_by_itself_is_refused() -> None:
    with pytest.raises(dpfix.ArgumentError, match="only a loader of dpfix's can deliver its batches in parts"):
        dpfix.make_private_safe(**given(poisson_sampling=False, max_physical_batch_size=3))


@pytest.mark.parametrize("mode", ["bookkeeping", "vmap"])
def test_the_size_is_found_from_what_is_free(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """Half of it, without what the training holds anyway, shared out among samples."""
    call = given(grad_sample_mode=mode, max_physical_batch_size="auto")
    weights = sum(p.numel() * p.element_size() for p in call["module"].parameters())
    largest = max(p.numel() * p.element_size() for p in call["module"].parameters())
    sizes = []
    for free in (0, 4 * weights + 20 * weights, 10**9):
        monkeypatch.setattr(physical, "free_memory", lambda device, ranks, free=free: free)
        sizes.append(dpfix.make_private_safe(**copy.deepcopy(call)).plan.physical)
    least = weights if mode == "vmap" else largest
    assert sizes[0] == 1 and sizes[2] == 24 and 1 <= sizes[1] < 10 * weights / least


class Scaled(nn.Module):
    """A model whose call one batch does not tell."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor, scale: int) -> Tensor:
        return self.net(x) / scale


def test_where_the_first_real_step_decides_a_number_is_kept_and_auto_is_refused() -> None:
    def call(size: Any) -> dpfix.PrivateTraining:
        torch.manual_seed(0)
        model = Scaled()
        return dpfix.make_private_safe(
            **given(module=model, optimizer=sgd(model, 0.1), criterion=None, max_physical_batch_size=size)
        )

    found = []
    for size in (3, None):
        model, optimizer, loader = training = call(size)
        for x, y in loader:
            assert size is None or len(x) <= size
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x, 2), y).backward()
            optimizer.step()
        assert training.plan.physical == size
        found.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))
    with pytest.raises(dpfix.ArgumentError, match="the memory of a step can only be measured"):
        call("auto")


def test_a_step_of_more_samples_keeps_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a network with wide activations, fewer samples fit."""
    fitting = []
    for width in (8, 64):
        model = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3))
        monkeypatch.setattr(physical, "free_memory", lambda device, ranks: 10**5)
        call = given(module=model, optimizer=sgd(model), max_physical_batch_size="auto", grad_sample_mode="vmap")
        fitting.append(dpfix.make_private_safe(**call).plan.physical)
    assert fitting[0] > fitting[1]


def test_free_memory_is_what_this_machine_has() -> None:
    alone, of_four = (physical.free_memory(torch.device("cpu"), ranks) for ranks in (1, 4))
    assert 2**20 < of_four < alone < 2**50


def test_lack_of_memory_says_which_size_to_take() -> None:
    """In the model's own forward pass; nothing moves, and the loop can go on with the next batch."""
    model = mlp()

    def fail(*_: Any) -> None:
        if failing:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    failing: list[int] = []
    training = dpfix.make_private_safe(**given(module=model, optimizer=sgd(model, 0.1)))
    private, optimizer, loader = training
    model[0].register_forward_pre_hook(fail)
    before = [p.detach().clone() for p in model.parameters()]
    batches = iter(loader)
    x, y = next(batches)
    failing.append(1)
    with pytest.raises(torch.OutOfMemoryError) as raised:
        private(x)
    failing.clear()
    (note,) = raised.value.__notes__
    assert f"with {len(x)} samples at a time" in note and f"max_physical_batch_size={len(x) // 2}" in note
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    x, y = next(batches)
    optimizer.zero_grad()
    nn.functional.cross_entropy(private(x), y).backward()
    optimizer.step()
    assert not all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))

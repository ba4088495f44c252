"""Loaders in wrappers that are no ``DataLoader``, and ``torch.compile``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import dpfix
from tests.helpers import points, setting, train


class OnDevice:
    """What many scripts have: a loop around a loader that moves the batches."""

    def __init__(self, loader: Any, device: str) -> None:
        self.loader, self.device = loader, device

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            yield tuple(t.to(self.device) for t in batch)


def test_a_wrapped_loader_comes_back_in_a_like_wrapper() -> None:
    given = OnDevice(DataLoader(points(), batch_size=8), "cpu")
    inner = given.loader
    private = dpfix.make_private_safe(**setting(data_loader=given))
    assert type(private[-1]) is OnDevice and private[-1].device == "cpu" and given.loader is inner
    train(private, 3)
    statement = private.statement(1e-3)
    assert (statement.steps, statement.samples, statement.sampling_used) == (3, 24, "Poisson")


def test_what_holds_no_loader_or_several_is_refused() -> None:
    class Two:
        def __init__(self) -> None:
            self.a, self.b = (DataLoader(points(), batch_size=8) for _ in range(2))

    for given in (Two(), [1, 2, 3]):
        with pytest.raises(dpfix.ArgumentError, match="data_loader is"):
            dpfix.make_private_safe(**setting(data_loader=given))


@pytest.mark.parametrize("wrap_model", [True, False])
@pytest.mark.parametrize("told", [True, False])
def test_a_compiled_private_model_is_not_compiled_at_every_batch_size(wrap_model: bool, told: bool) -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    given = setting(net, wrap_model=wrap_model)
    if not told:
        del given["criterion"]
    private = dpfix.make_private_safe(**given)
    compiled: list[int] = []

    def backend(graph: Any, examples: Any) -> Any:
        compiled.append(len(examples))
        return graph

    torch.compiler.reset()
    model = torch.compile(private[0] if wrap_model else net, backend=backend)
    sizes = set()
    for _ in range(2):
        for x, y in private[-1]:
            private[1].zero_grad()
            F.cross_entropy(model(x), y).backward()
            private[1].step()
            sizes.add(len(x))
    assert len(sizes) > 2 and private.statement(1e-3).steps == 6
    assert compiled == []  # the engine works step by step

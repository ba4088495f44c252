"""Batches whose samples are one graph: the numbers of nodes in their edges are those of the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import dpfix
from tests.helpers import sgd

NODES, FEATURES, EDGES = 5, 6, 9


class OneGraph(nn.Module):
    """Messages along edges, and the mean over the nodes of each graph."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.other, self.head = nn.Linear(FEATURES, 8), nn.Linear(FEATURES, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, edges: Tensor, graph: Tensor) -> Tensor:
        h = F.relu(self.own(x).index_add(0, edges[1], self.other(x)[edges[0]]))
        count = int(graph.max()) + 1
        return self.head(h.new_zeros(count, 8).index_add(0, graph, h) / NODES)


def graphs(count: int = 24) -> list[Any]:
    draw = torch.Generator().manual_seed(0)
    return [
        (torch.randn(NODES, FEATURES, generator=draw), torch.randint(NODES, (2, EDGES), generator=draw), i % 3)
        for i in range(count)
    ]


def joined(items: list[Any]) -> tuple[Tensor, ...]:
    x, edges, y = zip(*items, strict=True)
    graph = torch.arange(len(items)).repeat_interleave(NODES)
    return torch.cat(x), torch.cat([e + NODES * i for i, e in enumerate(edges)], 1), graph, torch.tensor(y)


def training(**options: Any) -> tuple[nn.Module, Any, Any]:
    torch.manual_seed(0)
    model = OneGraph()
    loader: Any = DataLoader(graphs(), 6, shuffle=True, collate_fn=joined)  # type: ignore[arg-type]
    made = dpfix.make_private_safe(
        module=model, optimizer=sgd(model, 0.1), data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0,
        criterion=nn.CrossEntropyLoss(), cache=False, checks=1.0, **options,
    )  # fmt: skip
    return tuple(made)  # type: ignore[return-value]


@pytest.mark.parametrize("told", [True, False])
def test_graphs_of_a_batch_as_one_graph_are_trained(told: bool) -> None:
    step = (lambda m, batch: F.cross_entropy(m(*batch[:3]), batch[3])) if told else None
    model, optimizer, loader = training(training_step=step)
    before = model.head.weight.detach().clone()  # type: ignore[union-attr]
    for _ in range(2):
        for x, edges, graph, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x, edges, graph), y).backward()
            optimizer.step()
    assert not torch.equal(before, model.head.weight)  # type: ignore[arg-type]


def test_an_edge_between_two_graphs_is_refused() -> None:
    model, optimizer, loader = training(training_step=None)

    def steps() -> None:
        for x, edges, graph, y in loader:
            if len(y) > 1:
                edges[0, 0], edges[0, EDGES] = NODES, 0  # nodes of each other
            optimizer.zero_grad()
            F.cross_entropy(model(x, edges, graph), y).backward()
            optimizer.step()

    with pytest.raises(dpfix.DPFixError, match="mixes the samples"):
        steps()

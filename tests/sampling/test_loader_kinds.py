"""Loaders of every kind: what trains, and what is refused with a way to index it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, SubsetRandomSampler

import dpfix
from tests.helpers import points, setting, train


@pytest.mark.parametrize("poisson", [True, False])
def test_fewer_samples_than_a_batch_that_is_dropped(poisson: bool) -> None:
    loader = DataLoader(points(5), batch_size=8, drop_last=True)
    with pytest.raises(dpfix.LoaderError, match=r"DPF011.*5 sample\(s\) for batches of 8[\s\S]*batch_size=5 or less"):
        dpfix.make_private_safe(**setting(data_loader=loader, poisson_sampling=poisson))
    given = setting(data_loader=loader)
    del given["noise_multiplier"]
    with pytest.raises(dpfix.LoaderError, match="it delivers nothing"):
        dpfix.make_private_safe_with_epsilon(**given, target_epsilon=3.0, target_delta=1e-2, epochs=2)


def test_a_batch_of_all_samples_trains() -> None:
    training = dpfix.make_private_safe(**setting(data_loader=DataLoader(points(5), batch_size=5, drop_last=True)))
    assert train(training, 2) == 2
    training = dpfix.make_private_safe(**setting(data_loader=DataLoader(points(5), batch_size=8)))
    assert train(training, 2) == 2


def test_a_sampler_without_an_index() -> None:
    loader = DataLoader(points(), batch_size=4, sampler=SubsetRandomSampler([]))
    with pytest.raises(dpfix.LoaderError, match="SubsetRandomSampler without an index"):
        dpfix.make_private_safe(**setting(data_loader=loader))


class Stream(IterableDataset[Any]):
    """Samples one after the other, as from tar shards."""

    def __iter__(self) -> Iterator[Any]:
        return iter([(torch.zeros(6), 0)] * 8)


class Loader:
    """A loader that is not torch's."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset


@pytest.mark.parametrize(
    ("loader", "error", "text"),
    [
        (
            lambda: DataLoader(Stream(), batch_size=4),
            dpfix.LoaderError,
            "index it: .*__getitem__.*streaming=False.*WebDataset",
        ),
        (lambda: DataLoader(Stream(), batch_size=None), dpfix.LoaderError, "index it: "),
        (lambda: Loader(Stream()), dpfix.ArgumentError, "data_loader is Loader[\\s\\S]*has to be indexed first"),
    ],
)
def test_a_stream_is_refused_with_the_way_to_index_it(loader: Callable[[], Any], error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        dpfix.make_private_safe(**setting(data_loader=loader()))


class Rows(Dataset[Any]):
    """A table that gives rows as dictionaries, and several at once, as Hugging Face's ``datasets`` do."""

    def __init__(self) -> None:
        self.columns = dict(zip(("x", "y"), points().tensors, strict=True))
        self.reads = list[Any]()

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: column[index] for name, column in self.columns.items()}

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        self.reads.append(indices)
        return [self[i] for i in indices]


def test_a_table_that_is_read_by_rows_trains() -> None:
    given = setting(data_loader=DataLoader(Rows(), batch_size=8, shuffle=True))
    model, optimizer, loader = dpfix.make_private_safe(**given)
    for batch in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(batch["x"]), batch["y"]).backward()
        optimizer.step()
    assert given["data_loader"].dataset.reads


def positives_only(out: Tensor, y: Tensor) -> Tensor:
    """The mean over the positives, by a Python number."""
    chosen = [F.cross_entropy(out[i : i + 1], y[i : i + 1]) for i in range(len(y)) if y[i] > 0]
    return sum(chosen) / len(chosen)  # type: ignore[return-value]


def with_positives(model: nn.Module, batch: Any) -> Tensor:
    out = model(batch[0])
    return F.cross_entropy(out, batch[1]) + positives_only(out, batch[1])


@pytest.mark.parametrize("told", [{"criterion": positives_only}, {"criterion": None, "training_step": with_positives}])
def test_a_head_for_positives_only_is_refused_with_a_way_out(told: dict[str, Any]) -> None:
    with pytest.raises(dpfix.CoupledLossError, match=r"DPF014.*ZeroDivisionError[\s\S]*PerSampleLoss") as refusal:
        dpfix.make_private_safe(**setting(**told))
    assert "not on one alone" in str(refusal.value)


def test_a_sample_without_positives_contributes_nothing_to_a_loss_per_sample() -> None:
    loss = dpfix.PerSampleLoss(positives_only)
    out, y = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 1, 0, 2])
    value = loss(out, y)
    torch.testing.assert_close(value, (F.cross_entropy(out, y, reduction="none") * (y > 0)).mean())
    value.backward()
    assert not out.grad[[0, 2]].any()
    training = dpfix.make_private_safe(**setting(criterion=loss))
    assert train(training, 3, loss) == 3


# ------------------------------------------------------------------ graphs of varying size


class Graphs(Dataset[Any]):
    """Graphs of three to seven nodes."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(index)
        nodes = 3 + index % 5
        edges = torch.randint(0, nodes, (2, 2 * nodes), generator=draw)
        return {"x": torch.randn(nodes, 6, generator=draw), "edges": edges, "y": torch.tensor(index % 3)}


class Net(nn.Module):
    """One step along the edges, then the sum over each graph's nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, edges: Tensor, graph: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        x = x.index_add(0, edges[1], x[edges[0]])
        return self.last(torch.zeros(int(graph[-1]) + 1, 8).index_add(0, graph, x))


class OneByOne(Net):
    """The same for a list of graphs."""

    def forward(self, graphs: list[Any]) -> Tensor:  # type: ignore[override]
        none = torch.zeros(7, dtype=torch.long)
        return torch.cat([super(OneByOne, self).forward(g["x"], g["edges"], none[: len(g["x"])]) for g in graphs])


def one_graph(items: list[Any]) -> dict[str, Tensor]:
    """All graphs as one, with the number of each node's graph."""
    sizes = torch.tensor([len(item["x"]) for item in items])
    first = sizes.cumsum(0) - sizes
    return {
        "x": torch.cat([item["x"] for item in items]),
        "edges": torch.cat([item["edges"] + n for item, n in zip(items, first, strict=True)], 1),
        "graph": torch.arange(len(items)).repeat_interleave(sizes),
        "y": torch.stack([item["y"] for item in items]),
    }


def step_on_one_graph(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["x"], batch["edges"], batch["graph"]), batch["y"])


def step_on_list(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch), torch.stack([item["y"] for item in batch]))


def test_graphs_in_one_are_refused_with_the_way_to_give_them() -> None:
    loader = DataLoader(Graphs(), batch_size=4, collate_fn=one_graph)
    with pytest.raises(
        dpfix.NoEngineError, match=r"DPF016[\s\S]*graphs[\s\S]*padded[\s\S]*list with one entry per sample"
    ):
        dpfix.make_private_safe(**setting(Net(), data_loader=loader, criterion=None, training_step=step_on_one_graph))


def test_a_list_of_graphs_trains() -> None:
    loader = DataLoader(Graphs(), batch_size=4, collate_fn=list)
    given = setting(OneByOne(), data_loader=loader, criterion=None, training_step=step_on_list)
    model, optimizer, private = dpfix.make_private_safe(**given)
    for batch in private:
        optimizer.zero_grad()
        step_on_list(model, batch).backward()
        optimizer.step()

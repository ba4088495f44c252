"""Every known way in which a loop couples samples on real data is stopped before a parameter moves, whatever was told."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

import dpfix
from dpfix.instrument.source import DPFixWarning
from tests.training.follow.scripts import Items

COUNT, LENGTH = 24, 6
CLEAN = ([1, 2, 3, 4], [5, 6, 7], [8, 9, 10, 11], [1, 3, 5, 7])
"""Draws of samples that show nothing; those with the numbers from 12 on are unlike them."""
SHOWS = [1, 2, 13, 14, 15]


def rows(*, seed: int = 1) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(6, generator=draw) * (0.4 + 0.1 * i) for i in range(COUNT)]


def network(outputs: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, outputs))


def labelled(label: Callable[[int], Any] = lambda i: i % 3) -> list[Any]:
    return [(x, label(i)) for i, x in enumerate(rows())]


def token_items() -> list[Any]:
    """Sequences whose targets are all valid; from number 12 on one only is."""
    draw = torch.Generator().manual_seed(2)
    out = []
    for i in range(COUNT):
        y = torch.randint(0, 3, (LENGTH,), generator=draw)
        if i >= 12:
            y[1:] = -100
        out.append((torch.randn(LENGTH, 6, generator=draw), y))
    return out


def ragged() -> list[Any]:
    """Sequences with their lengths as Python numbers; those from number 12 on are longer."""
    draw = torch.Generator().manual_seed(3)
    lengths = [2 + i % 2 if i < 12 else 3 + i % 4 for i in range(COUNT)]
    return [(torch.randn(LENGTH, 6, generator=draw), i % 3, n) for i, n in enumerate(lengths)]


def with_lengths(items: list[Any]) -> Any:
    x, y, n = zip(*items, strict=True)
    return torch.stack(x), torch.tensor(y), list(n)


def with_label_list(items: list[Any]) -> Any:
    return torch.stack([x for x, _ in items]), [y for _, y in items]


def gaps(value: float) -> list[Any]:
    """Float targets of which some are missing from number 12 on."""
    draw = torch.Generator().manual_seed(4)
    out = []
    for i, x in enumerate(rows()):
        t = torch.randn(3, generator=draw)
        if i >= 12:
            t[1:] = value
        out.append((x, t))
    return out


# ------------------------------------------------------------------ losses


@dataclass(frozen=True)
class Row:
    """A way to couple samples.

    Attributes:
        name: for the test's name.
        items: the samples.
        loss: the training step that the loop makes.
        model: builds the model.
        collate: makes a batch.
        criterion: the criterion, where it says all of the loss.
        other: a criterion that is right, told although the loop computes something else.
        at_once: whether it shows in every draw.
        warned: whether a warning is enough: Python numbers hide it.
        options: further arguments of the call.
    """

    name: str
    items: Callable[[], list[Any]]
    loss: Callable[[Any, Any], Tensor]
    model: Callable[[], nn.Module] = network
    collate: Callable[[list[Any]], Any] = default_collate
    criterion: Callable[..., Tensor] | None = None
    other: Callable[..., Tensor] | None = None
    at_once: bool = False
    warned: bool = False
    options: dict[str, Any] = field(default_factory=dict)


def on_tokens(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any, Any], Tensor]:
    return lambda model, batch: loss(model(batch[0]).transpose(1, 2), batch[1])


def on_pairs(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any, Any], Tensor]:
    return lambda model, batch: loss(model(batch[0]), batch[1])


def flattened_before(model: Any, batch: Any) -> Tensor:
    y = batch[1].reshape(-1)
    return F.cross_entropy(model(batch[0]).reshape(-1, 3), y)


def masked_before(model: Any, batch: Any) -> Tensor:
    valid = batch[1] != -100
    y = batch[1][valid]
    return F.cross_entropy(model(batch[0])[valid], y)


def counted_before(model: Any, batch: Any) -> Tensor:
    n = torch.bincount(batch[1], minlength=3).float()
    weight = (1 / n.clamp(min=1))[batch[1]]
    return (weight * F.cross_entropy(model(batch[0]), batch[1], reduction="none")).mean()


def standardised_targets(model: Any, batch: Any) -> Tensor:
    t = batch[1]
    t = (t - t.mean(0)) / (t.std(0, correction=0) + 1e-3)
    return F.mse_loss(model(batch[0]), t)


def tokens_sum_over_count(model: Any, batch: Any) -> Tensor:
    y = batch[1].reshape(-1)
    n = int((y != -100).sum())
    return F.cross_entropy(model(batch[0]).reshape(-1, 3), y, reduction="sum") / n


def over_lengths(model: Any, batch: Any) -> Tensor:
    x, y, n = batch
    return F.cross_entropy(model(x).mean(1), y, reduction="sum") / sum(n)


def over_longest(model: Any, batch: Any) -> Tensor:
    x, y, n = batch
    return F.cross_entropy(model(x).mean(1), y) / max(n)


class Averaged(nn.Module):
    """Means over all places of a sequence, padding included."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).mean(1)


def sliced(model: Any, batch: Any) -> Tensor:
    """Padding is cut off to the longest of the batch before a model that does not mask it."""
    x, y, n = batch
    return F.cross_entropy(model(x[:, : max(n)]), y)


def rare_of_list(model: Any, batch: Any) -> Tensor:
    x, y = batch
    weight = 1.0 / (1 + sum(1 for label in y if label == 2))
    return weight * F.cross_entropy(model(x), torch.tensor(y))


def weighted_list(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), torch.tensor(batch[1]), weight=torch.tensor([1.0, 1.0, 60.0]))


def nan_masked(out: Tensor, t: Tensor) -> Tensor:
    there = ~torch.isnan(t)
    return (out - torch.nan_to_num(t))[there].square().mean()


def sentinel_masked(out: Tensor, t: Tensor) -> Tensor:
    there = (t != -999).float()
    return ((out - t).square() * there).sum() / there.sum()


def imputed(out: Tensor, t: Tensor) -> Tensor:
    return F.mse_loss(out, torch.where(torch.isnan(t), t.nanmean(0), t))


class Named(nn.Module):
    """A model in the form of Hugging Face's: named inputs, its own loss if it gets labels."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.inner(inputs)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def named(items: list[Any]) -> dict[str, Tensor]:
    x, y = default_collate(items)
    return {"inputs": x, "labels": y}


def loss_of_logits(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(**batch)["logits"], batch["labels"], weight=torch.tensor([1.0, 10.0, 0.1]))


def mixup(model: Any, batch: Any) -> Tensor:
    x, y = batch
    other = torch.arange(len(x)).roll(1)
    out = model(0.65 * x + 0.35 * x[other])
    return 0.65 * F.cross_entropy(out, y) + 0.35 * F.cross_entropy(out, y[other])


def over_the_largest(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0] / batch[0].abs().max()), batch[1])


def standardised(model: Any, batch: Any) -> Tensor:
    x = batch[0]
    return F.cross_entropy(model((x - x.mean(0)) / (x.std(0, correction=0) + 1e-3)), batch[1])


def negatives(model: Any, batch: Any) -> Tensor:
    a, b = F.normalize(model(batch[0]), dim=1), F.normalize(model(batch[0] * 0.9 + 0.1), dim=1)
    return F.cross_entropy(a @ b.T / 0.2, torch.arange(len(a)))


def solved() -> nn.Module:
    model = nn.Linear(6, 3)
    with torch.no_grad():
        model.weight.copy_(6 * torch.eye(3, 6))
        model.bias.zero_()
    return model


def one_hot() -> list[Any]:
    draw = torch.Generator().manual_seed(6)
    return [(5 * F.one_hot(torch.tensor(i % 3), 6) + 0.2 * torch.randn(6, generator=draw), i % 3) for i in range(COUNT)]


def covariance_penalty(model: Any, batch: Any) -> Tensor:
    out = model(batch[0])
    z = out - out.mean(0)
    return F.cross_entropy(out, batch[1]) + 1e-3 * (z.T @ z / len(z)).square().mean()


def variance_penalty(model: Any, batch: Any) -> Tensor:
    out = model(batch[0])
    return F.cross_entropy(out, batch[1]) + 1e-3 * out.var(0, correction=0).mean()


def pairs_of_a_label(model: Any, batch: Any) -> Tensor:
    """Every anchor with every other sample of its label and every sample of another; many classes, few pairs."""
    f, y = model(batch[0]), batch[1]
    d = (f[:, None] - f[None]).square().sum(2)
    same, other = (y[:, None] == y[None]).float() - torch.eye(len(f)), (y[:, None] != y[None]).float()
    wanted = same[:, :, None] * other[:, None, :]
    each = F.relu(d[:, :, None] - d[:, None, :] + 1.0) * wanted
    return each.sum() / wanted.sum().clamp(min=1) + 1e-2 * f.square().sum(1).mean()


def many_classes() -> list[Any]:
    """All labels differ, until the numbers from 12 on."""
    return labelled(lambda i: i if i < 12 else 12 + i % 2)


def contrastive(model: Any, batch: Any) -> Tensor:
    f, y = F.normalize(model(batch[0]), dim=1), batch[1]
    same = ((y[:, None] == y[None]).float() - torch.eye(len(f))).clamp(min=0)
    logits = f @ f.T / 0.5 - 1e9 * torch.eye(len(f))
    each = -(same * logits.log_softmax(1)).sum(1) / same.sum(1).clamp(min=1)
    return each.mean() + 1e-2 * model(batch[0]).square().sum(1).mean()


def hardest(model: Any, batch: Any) -> Tensor:
    each = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    return each.topk(min(2, len(each))).values.mean()


CE = nn.CrossEntropyLoss()
HEAVY = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 1.0, 20.0]))
IGNORE = nn.CrossEntropyLoss(ignore_index=2)


def rare(i: int) -> int:
    return i % 2 if i < 12 or i % 3 else 2


def token_mean(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out.transpose(1, 2), y)


ROWS = (
    Row("mean over valid tokens", token_items, on_tokens(CE), criterion=token_mean),
    Row("sum of lengths", ragged, over_lengths, collate=with_lengths, warned=True, at_once=True),
    Row("longest length", ragged, over_longest, collate=with_lengths, warned=True, at_once=True),
    Row("count of a Python label", labelled, rare_of_list, collate=with_label_list, warned=True, at_once=True),
    Row("weighted mean, labels as a list", labelled, weighted_list, collate=with_label_list, at_once=True),
    Row("missing targets, NaN", lambda: gaps(float("nan")), on_pairs(nan_masked), criterion=nan_masked),
    Row("missing targets, -999", lambda: gaps(-999.0), on_pairs(sentinel_masked), criterion=sentinel_masked),
    Row("imputed by the mean of the batch", lambda: gaps(float("nan")), on_pairs(imputed), criterion=imputed),
    Row("rare heavy class", lambda: labelled(rare), on_pairs(HEAVY), criterion=HEAVY),
    Row("rare ignored class", lambda: labelled(rare), on_pairs(IGNORE), criterion=IGNORE),
    Row("labels flattened before", token_items, flattened_before, other=token_mean),
    Row("labels masked before", token_items, masked_before),
    Row("labels counted before", labelled, counted_before, at_once=True, other=CE),
    Row("targets standardised before", lambda: gaps(0.0), standardised_targets, at_once=True, other=nn.MSELoss()),
    Row("another loss from the logits", labelled, loss_of_logits, Named, named, at_once=True),
    Row("sum over a number of tokens", token_items, tokens_sum_over_count, options={"loss_reduction": "sum"}, warned=True),
    Row("mixup", labelled, mixup, at_once=True, other=CE),
    Row("over the largest of the batch", labelled, over_the_largest, at_once=True, other=CE),
    Row("standardised over the batch", labelled, standardised, at_once=True, other=CE),
    Row("in-batch negatives", labelled, negatives, at_once=True),
    Row("cut to the longest", ragged, sliced, Averaged, with_lengths, at_once=True),
    Row("covariance penalty, task solved", one_hot, covariance_penalty, solved, at_once=True, other=CE),
    Row("variance penalty, task solved", one_hot, variance_penalty, solved, at_once=True, other=CE),
    Row("triplets of a label, many classes", many_classes, pairs_of_a_label),
    Row("contrastive, many classes", many_classes, contrastive),
    Row("the hardest of the batch", labelled, hardest, at_once=True, other=CE),
)  # fmt: skip


def tellings(row: Row) -> list[tuple[str, dict[str, Any]]]:
    told: list[tuple[str, dict[str, Any]]] = [("nothing", {}), ("training_step", {"training_step": row.loss})]
    if row.criterion is not None:
        told.append(("criterion", {"criterion": row.criterion}))
    if row.other is not None:
        told.append(("another criterion", {"criterion": row.other}))
    return told


CASES = [(row, told, arguments) for row in ROWS for told, arguments in tellings(row)]


def values(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


def start(model: nn.Module, items: list[Any], collate: Any = default_collate, **arguments: Any) -> Any:
    return dpfix.make_private_safe(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
        data_loader=DataLoader(Items(items), batch_size=6, collate_fn=collate),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        **arguments,
    )


@pytest.mark.parametrize(("row", "told", "arguments"), CASES, ids=[f"{row.name}: {told}" for row, told, _ in CASES])
def test_coupling_is_stopped_before_a_parameter_moves(row: Row, told: str, arguments: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, items = row.model(), row.items()
    before, step = values(model), -1
    draws = [SHOWS, SHOWS] if row.at_once else [*CLEAN, SHOWS, SHOWS]
    with warnings.catch_warnings():
        warnings.simplefilter("error", DPFixWarning)
        with pytest.raises((dpfix.DPFixError, DPFixWarning)) as stopped:
            training = start(model, items, row.collate, **row.options, **arguments)
            private, optimizer, loader = training
            vars(loader)["batch_sampler"] = draws
            for batch in loader:
                step += 1
                before = values(model)
                optimizer.zero_grad()
                row.loss(private, batch).backward()
                optimizer.step()
    shown = 0 if row.at_once else len(CLEAN)
    assert step <= shown, f"stopped in step {step}; it shows in step {shown}"
    assert row.warned or isinstance(stopped.value, dpfix.DPFixError)
    assert torch.equal(values(model), before), "a parameter has moved"
    text = str(stopped.value)
    if step >= 0:
        assert re.search(r"\w+\.py:\d+", text), text
    assert not re.search(r"\d\.\d\d", text), "a number with so many digits can be data"

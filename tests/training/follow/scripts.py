"""Right scripts, put together from parts: a loss, a form of the batch, what is done before the model, and a loop.

In none of them does a sample feel another. A part may be anything that scripts do; what goes together says :func:`fits`.
"""

from __future__ import annotations

import copy
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate
from torch.utils.data import Dataset as TorchDataset

import dpfix

BATCH, SAMPLES, FEATURES, LENGTH = 8, 40, 6, 5
Item = tuple[Tensor, Any]


# ------------------------------------------------------------------ data and models


def features(draw: torch.Generator) -> Tensor:
    return torch.randn(FEATURES, generator=draw)


def classes(count: int) -> Callable[[int, torch.Generator], Item]:
    return lambda i, draw: (features(draw), i % count)


def amounts(outputs: int) -> Callable[[int, torch.Generator], Item]:
    return lambda i, draw: (features(draw), torch.randn(outputs, generator=draw))


def yes_or_no(i: int, draw: torch.Generator) -> Item:
    return features(draw), float(i % 2)


def tokens(i: int, draw: torch.Generator) -> Item:
    y = torch.randint(0, 3, (LENGTH,), generator=draw)
    y[1 + i % LENGTH :] = -100
    return torch.randn(LENGTH, FEATURES, generator=draw), y


def triples(i: int, draw: torch.Generator) -> Item:
    """A sample that is an anchor, its positive and its negative."""
    return torch.randn(3, FEATURES, generator=draw), i % 3


def network(outputs: int = 3) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(FEATURES, 7), nn.Tanh(), nn.Linear(7, outputs))


class Squeezed(nn.Module):
    """Gives one number per sample, without a dimension of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network(1)()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).squeeze(1)


# ------------------------------------------------------------------ losses


@dataclass(frozen=True)
class Loss:
    """A right loss.

    Attributes:
        name: for the test's name.
        items: makes a sample of its number.
        model: builds the model.
        of: from the model's output, the labels and the inputs to the loss.
        tellable: whether it needs output and labels only, so that it can be told as a criterion.
        tokens: whether labels and inputs have a dimension for time.
    """

    name: str
    items: Callable[[int, torch.Generator], Item]
    model: Callable[[], nn.Module]
    of: Callable[[Tensor, Tensor, Tensor], Tensor]
    tellable: bool = True
    tokens: bool = False


def told_as(criterion: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda out, y, x: criterion(out, y)


TEACHER = nn.Sequential(
    nn.Linear(FEATURES, BATCH), nn.ReLU(), nn.Linear(BATCH, 3)
).eval()  # as wide as the batch is large
PROTOTYPES = torch.randn(BATCH, 3)
COSTS = torch.rand(BATCH, BATCH)
EYE = torch.eye(BATCH)


def distilled(out: Tensor, y: Tensor, x: Tensor) -> Tensor:
    with torch.no_grad():
        wanted = TEACHER(x).softmax(1)
    return F.kl_div(out.log_softmax(1), wanted, reduction="batchmean")


def distilled_and_right(out: Tensor, y: Tensor, x: Tensor) -> Tensor:
    with torch.no_grad():
        wanted = (TEACHER(x) / 2).softmax(1)
    soft = F.kl_div((out / 2).log_softmax(1), wanted, reduction="none").sum(1).mean()
    return 0.7 * 4 * soft + 0.3 * F.cross_entropy(out, y)


def focal(out: Tensor, y: Tensor) -> Tensor:
    each = F.cross_entropy(out, y, reduction="none")
    return ((1 - torch.exp(-each)) ** 2 * each).mean()


def weighted_by_hand(out: Tensor, y: Tensor) -> Tensor:
    return (torch.tensor([0.5, 1.0, 4.0])[y] * F.cross_entropy(out, y, reduction="none")).mean()


def every_sample(out: Tensor, y: Tensor) -> Tensor:
    return torch.stack([F.cross_entropy(o[None], t[None]) for o, t in zip(out, y, strict=True)]).mean()


def added_up(out: Tensor, y: Tensor) -> Tensor:
    total = torch.zeros(())
    for i in range(len(out)):
        total = total + F.cross_entropy(out[i : i + 1], y[i : i + 1])
    return total / len(out)


def valid_mean(out: Tensor, y: Tensor) -> Tensor:
    each = F.cross_entropy(out.transpose(1, 2), y, reduction="none", ignore_index=-100)
    valid = (y != -100).float()
    return ((each * valid).sum(1) / valid.sum(1).clamp(min=1)).mean()


def over_all_tokens(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out.flatten(0, 1), y.flatten(), reduction="sum", ignore_index=-100) / y.numel()


def triplet(out: Tensor, y: Tensor, x: Tensor) -> Tensor:
    return F.triplet_margin_loss(out[:, 0], out[:, 1], out[:, 2])


def cosine(out: Tensor, y: Tensor, x: Tensor) -> Tensor:
    near = 1 - F.cosine_similarity(out[:, 0], out[:, 1], dim=1)
    far = F.cosine_similarity(out[:, 0], out[:, 2], dim=1).clamp(min=0)
    return (near + far).mean()


LOSSES = (
    Loss("cross-entropy", classes(3), network(), told_as(nn.CrossEntropyLoss())),
    Loss("smoothed", classes(3), network(), told_as(nn.CrossEntropyLoss(label_smoothing=0.1))),
    Loss("nll", classes(3), network(), told_as(lambda out, y: F.nll_loss(out.log_softmax(-1), y))),
    Loss("bce", yes_or_no, Squeezed, told_as(nn.BCEWithLogitsLoss())),
    Loss("bce-column", yes_or_no, network(1), told_as(lambda o, y: F.binary_cross_entropy_with_logits(o[:, 0], y))),
    Loss("bce-positive", yes_or_no, Squeezed, told_as(nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0)))),
    Loss("mse", amounts(2), network(2), told_as(nn.MSELoss())),
    Loss("mse-sum", amounts(2), network(2), told_as(lambda o, y: (o - y).square().sum() / len(o))),
    Loss("smooth-l1", amounts(2), network(2), told_as(nn.SmoothL1Loss())),
    Loss("huber-each", amounts(2), network(2), told_as(lambda o, y: F.huber_loss(o, y, reduction="none").mean(1).mean())),
    Loss("distilled", classes(3), network(), distilled, tellable=False),
    Loss("distilled-and-right", classes(3), network(), distilled_and_right, tellable=False),
    Loss("prototypes", classes(BATCH), network(), told_as(lambda o, y: F.cross_entropy(o @ PROTOTYPES.T, y))),
    Loss("distances", classes(BATCH), network(), told_as(lambda o, y: F.cross_entropy(-torch.cdist(o, PROTOTYPES), y))),
    Loss("costs", classes(BATCH), network(BATCH), told_as(lambda o, y: (o.softmax(1) * COSTS[y]).sum(1).mean())),
    Loss("one-hot", classes(BATCH), network(BATCH), told_as(lambda o, y: F.mse_loss(o, EYE[y]))),
    Loss("focal", classes(3), network(), told_as(focal)),
    Loss("weighted-by-hand", classes(3), network(), told_as(weighted_by_hand)),
    Loss("per-sample", classes(3), network(),
         told_as(dpfix.PerSampleLoss(nn.CrossEntropyLoss(weight=torch.tensor([0.1, 1.0, 5.0]))))),
    Loss("stack", classes(3), network(), told_as(every_sample), tellable=False),
    Loss("added-up", classes(3), network(), told_as(added_up), tellable=False),
    Loss("triplet", triples, network(), triplet, tellable=False),
    Loss("cosine", triples, network(), cosine, tellable=False),
    Loss("valid-tokens", tokens, network(), told_as(valid_mean), tokens=True),
    Loss("all-tokens", tokens, network(), told_as(over_all_tokens), tokens=True),
    Loss("per-sample-tokens", tokens, network(),
         told_as(lambda o, y: dpfix.PerSampleLoss(nn.CrossEntropyLoss())(o.transpose(1, 2), y)), tokens=True),
)  # fmt: skip


# ------------------------------------------------------------------ forms of the batch


Pair = namedtuple("Pair", "inputs targets")


@dataclass
class Record:
    """A batch as a dataclass."""

    inputs: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Form:
    """A form of the batch.

    Attributes:
        name: for the test's name.
        sample: what the dataset gives for the number, inputs and label of a sample.
        read: gives inputs and labels of a batch.
        collate: makes a batch.
        criterion: whether a criterion alone says how the loop uses such a batch.
    """

    name: str
    sample: Callable[[int, Any, Any], Any]
    read: Callable[[Any], tuple[Tensor, Tensor]]
    collate: Callable[[list[Any]], Any] = default_collate
    criterion: bool = True


def columns(items: list[Any]) -> tuple[Tensor, list[Any]]:
    return torch.stack([x for x, *_ in items]), [y for _, y, *_ in items]


def labels(given: list[Any]) -> Tensor:
    return torch.stack(given) if isinstance(given[0], Tensor) else torch.tensor(given)


def with_labels_as_list(items: list[Any]) -> Any:
    return columns(items)


def as_record(items: list[Any]) -> Record:
    x, y = columns(items)
    return Record(x, labels(y))


def with_report(items: list[Any]) -> dict[str, Any]:
    x, y = columns(items)
    return {"x": x, "y": labels(y), "meta": {"names": [n for *_, n in items], "count": len(items), "source": "ward"}}


FORMS = (
    Form("tuple", lambda i, x, y: (x, y), lambda b: (b[0], b[1])),
    Form("pair", lambda i, x, y: Pair(x, y), lambda b: (b.inputs, b.targets)),
    Form("dict", lambda i, x, y: {"image": x, "label": y}, lambda b: (b["image"], b["label"])),
    Form("dict-and-names", lambda i, x, y: {"image": x, "label": y, "name": f"case {i}", "age": 20 + 3 * i},
         lambda b: (b["image"], b["label"])),
    Form("three", lambda i, x, y: (x, y, i), lambda b: (b[0], b[1]), criterion=False),
    Form("nested", lambda i, x, y: {"x": {"image": x}, "y": y}, lambda b: (b["x"]["image"], b["y"]), criterion=False),
    Form("label-list", lambda i, x, y: (x, y), lambda b: (b[0], labels(b[1])), with_labels_as_list, criterion=False),
    Form("samples", lambda i, x, y: (x, y), lambda b: (torch.stack([x for x, _ in b]), labels([y for _, y in b])), list,
         criterion=False),
    Form("record", lambda i, x, y: (x, y), lambda b: (b.inputs, b.targets), as_record, criterion=False),
    Form("report", lambda i, x, y: (x, y, f"case {i}"), lambda b: (b["x"], b["y"]), with_report, criterion=False),
)  # fmt: skip


class Items(TorchDataset[Any]):
    """A dataset of a list."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


# ------------------------------------------------------------------ before the model


Before = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def as_it_is(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x, y


def shuffled(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    order = torch.randperm(len(x))
    return x[order], y[order]


def sorted_by_norm(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    order = x.flatten(1).norm(dim=1).argsort(descending=True)
    return x[order], y[order]


def turned(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x.flip(0), y.flip(0)


def noisy(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x + 0.1 * torch.randn_like(x), y


def dropped(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x * (torch.rand(len(x), *[1] * (x.dim() - 1)) < 0.9), y


def mirrored(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    mirror = torch.rand(len(x)) < 0.5
    x = x.clone()
    x[mirror] = x[mirror].flip(-1)
    return x, y


def normalised(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return (x - 0.1) / 1.2, y


def own_scale(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-6), y


def scaled_in_place(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    x = x.float().clone()
    x.mul_(0.5).add_(0.1)
    return x, y


def moved(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x.to("cpu", non_blocking=True).float(), y.to("cpu")


BEFORE: tuple[Before, ...] = (
    as_it_is, shuffled, sorted_by_norm, turned, noisy, dropped, mirrored, normalised, own_scale, scaled_in_place, moved
)  # fmt: skip


REORDERING = (shuffled, sorted_by_norm, turned)
"""What puts the samples into another order; the call refuses a step that does so, and is to be told less."""


# ------------------------------------------------------------------ loops


@dataclass
class Training:
    """What a loop works with.

    Attributes:
        model: the private model.
        optimizer: the private optimizer.
        loader: the private loader.
        read: gives inputs and labels of a batch.
        loss: from output, labels and inputs to the loss.
        before: what is done before the model.
        held_out: a few samples for evaluations.
        log: what the loop has logged.
    """

    model: Any
    optimizer: Any
    loader: Any
    read: Callable[[Any], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    before: Before
    held_out: Any
    log: list[Any]

    def prepared(self, batch: Any) -> tuple[Tensor, Tensor]:
        return self.before(*self.read(batch))

    def step_loss(self, model: Any, batch: Any) -> Tensor:
        x, y = self.prepared(batch)
        return self.loss(model(x), y, x)


Loop = Callable[[Training], Iterator[None]]
"""A loop; it yields after every step."""


def plain(t: Training) -> Iterator[None]:
    for batch in t.loader:
        t.optimizer.zero_grad()
        t.step_loss(t.model, batch).backward()
        t.optimizer.step()
        yield


def logged_before(t: Training) -> Iterator[None]:
    total, seen = 0.0, 0
    for batch in t.loader:
        t.optimizer.zero_grad()
        x, y = t.prepared(batch)
        loss = t.loss(t.model(x), y, x)
        total += loss.item() * len(x)
        seen += len(x)
        t.log.append(total / max(1, seen))
        loss.backward()
        t.optimizer.step()
        yield


def accuracy_around(t: Training) -> Iterator[None]:
    right = 0
    for batch in t.loader:
        t.optimizer.zero_grad()
        x, y = t.prepared(batch)
        out = t.model(x)
        right += int((out.detach().flatten()[: len(y)] > y.flatten()[: len(y)]).sum())
        t.loss(out, y, x).backward()
        t.optimizer.step()
        t.log.append((right, float(out.detach().mean())))
        yield


def annealed(t: Training) -> Iterator[None]:
    for number, batch in enumerate(t.loader):
        t.optimizer.zero_grad()
        x, y = t.prepared(batch)
        out = t.model(x)
        weight = min(1.0, 0.1 + 0.17 * number)
        loss = weight * t.loss(out, y, x) + 1e-3 * (1 - weight) * out.square().mean()
        t.log.append(loss.item())
        loss.backward()
        t.optimizer.step()
        yield


def with_scheduler(t: Training) -> Iterator[None]:
    schedule = torch.optim.lr_scheduler.StepLR(t.optimizer, step_size=1, gamma=0.9)
    for batch in t.loader:
        loss = t.step_loss(t.model, batch)
        t.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        t.optimizer.step()
        schedule.step()
        yield


def cleared_after(t: Training) -> Iterator[None]:
    t.optimizer.zero_grad()
    for batch in t.loader:
        t.step_loss(t.model, batch).backward()
        t.optimizer.step()
        t.optimizer.zero_grad()
        yield


def evaluated(t: Training) -> Iterator[None]:
    for number, batch in enumerate(t.loader):
        if number % 2:
            t.model.eval()
            with torch.no_grad():
                x, y = t.read(t.held_out)
                t.log.append(t.loss(t.model(x), y, x).item())
            t.model.train()
        t.optimizer.zero_grad()
        t.step_loss(t.model, batch).backward()
        t.optimizer.step()
        yield


def prefetched(t: Training) -> Iterator[None]:
    batches = iter(t.loader)
    following = next(batches, None)
    while following is not None:
        batch, following = following, next(batches, None)
        t.optimizer.zero_grad()
        t.step_loss(t.model, batch).backward()
        t.optimizer.step()
        yield


def penalised(t: Training) -> Iterator[None]:
    for batch in t.loader:
        t.optimizer.zero_grad()
        x, y = t.prepared(batch)
        out = t.model(x)
        loss = t.loss(out, y, x) + 1e-3 * out.square().sum() / len(out)
        if torch.isfinite(loss):
            loss.backward()
            t.optimizer.step()
        yield


def in_closure_of_logs(t: Training) -> Iterator[None]:
    for batch in t.loader:
        t.optimizer.zero_grad()
        x, y = t.prepared(batch)
        out = t.model(x)
        loss = t.loss(out, y, x)
        loss.backward()
        with torch.no_grad():
            t.log.append({"loss": loss.item(), "mean": out.mean().item(), "n": len(x), "classes": len(y.unique())})
        t.optimizer.step()
        yield


def statistics_logged_before(t: Training) -> Iterator[None]:
    for batch in t.loader:
        t.optimizer.zero_grad()
        x, y = t.prepared(batch)
        t.log.append({"mean": x.mean().item(), "std": x.std().item(), "positive": int((y > 0).sum()), "n": x.shape[0]})
        loss = t.loss(t.model(x), y, x)
        loss.backward()
        t.optimizer.step()
        yield


LOOPS: tuple[Loop, ...] = (
    plain, logged_before, accuracy_around, annealed, with_scheduler, cleared_after, evaluated, prefetched, penalised,
    in_closure_of_logs, statistics_logged_before,
)  # fmt: skip
OTHER_LOSS = (annealed, penalised)
"""Loops whose loss has a term more than what was told."""


# ------------------------------------------------------------------ scripts


@dataclass(frozen=True)
class Script:
    """A right script; ``told`` is what the call is told of its loss."""

    loss: Loss
    form: Form
    before: Before
    loop: Loop
    told: str

    @property
    def name(self) -> str:
        return " ".join((self.loss.name, self.form.name, self.before.__name__, self.loop.__name__, self.told))

    def loader(self) -> DataLoader[Any]:
        draw = torch.Generator().manual_seed(5)
        items = [self.form.sample(i, *self.loss.items(i, draw)) for i in range(SAMPLES)]
        return DataLoader(Items(items), batch_size=BATCH, collate_fn=self.form.collate)

    def start(self, **arguments: Any) -> Training:
        """Make the training private."""
        model, loader = self.loss.model(), self.loader()
        held_out = self.form.collate([loader.dataset[i] for i in range(5)])

        def step(model: nn.Module, batch: Any) -> Tensor:
            x, y = self.before(*self.form.read(batch))
            return self.loss.of(model(x), y, x)

        told: dict[str, Any] = {
            "nothing": {},
            "criterion": {"criterion": lambda out, y: self.loss.of(out, y, out)},
            "training_step": {"training_step": step},
        }[self.told]
        made = dpfix.make_private_safe(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
            data_loader=loader,
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            **told,
            **arguments,
        )
        return Training(*made, self.form.read, self.loss.of, self.before, copy.deepcopy(held_out), [])


def fits(script: Script) -> bool:
    """Whether the parts go together."""
    if script.told == "criterion":
        return script.loss.tellable and script.form.criterion
    if script.told == "training_step":  # what is told is what the loop computes
        return script.loop not in OTHER_LOSS and script.before not in REORDERING
    return True


def scripts(count: int, seed: int = 0) -> list[Script]:
    """Scripts, chosen by chance and always the same; every part is in about equally many of them."""
    draw = Random(seed)
    kinds: tuple[tuple[Any, ...], ...] = (LOSSES, FORMS, BEFORE, LOOPS, ("nothing", "criterion", "training_step"))
    decks: list[list[Any]] = [[] for _ in kinds]
    found: dict[str, Script] = {}
    while len(found) < count:
        for deck, parts in zip(decks, kinds, strict=True):
            if not deck:
                deck.extend(draw.sample(parts, len(parts)))
        script = Script(*(deck.pop() for deck in decks))
        if fits(script):
            found.setdefault(script.name, script)
    return list(found.values())

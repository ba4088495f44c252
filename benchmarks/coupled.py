"""Losses, layers and loops in which one sample feels another: what plain Opacus lets through, and what dpfix does.

``python -m benchmarks.coupled [--only TEXT] [--write docs/coupled.md]``

Sensitivity: how far leaving one sample out moves the sum that is released before noise, as a multiple of the clip norm C;
the worst over every sample, that sample as it is and 50 times as large, and seven C from 0.01 to 10. DP-SGD needs at most 1.
Plain Opacus gets the model after ``ModuleValidator.fix``, with ``grad_sample_mode="hooks"``; noise is 0 for both.

Set-ups of real data are trained for a few steps through the private loader, on draws that show nothing and then on one that
does; sensitivity is that of this last step. A warning about what cannot be followed counts as said.

The exit status is 1 if dpfix trains a set-up with a sensitivity above 1, or lets state leak.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from monai.losses import DiceLoss
from opacus.validators import ModuleValidator
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import DataLoader, default_collate

import dpfix
from benchmarks.common import tables
from benchmarks.common.libraries import FAILURES, Made, Step, with_dpfix, with_opacus
from benchmarks.common.models import classify
from benchmarks.common.process import quiet
from benchmarks.common.released import Gradients, distance, released
from benchmarks.common.tables import short
from dpfix.instrument.source import DPFixWarning

CLIP_NORMS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
SCALES = (1.0, 50.0)
Collate = Callable[[list[Any]], Any]


@dataclass(frozen=True)
class Setup:
    """One script.

    Attributes:
        group: heading in the table.
        name: what couples the samples.
        model: builds the model.
        items: builds the samples.
        loss: the training step.
        collate: how samples become a batch.
        scaled: scales one sample.
        state: whether it is state, not the released sum, that tells about a sample.
        cure: the same set-up as the message of dpfix tells to write it, if there is such a line.
    """

    group: str
    name: str
    model: Callable[[], nn.Module]
    items: Callable[[], list[Any]]
    loss: Step
    collate: Collate = default_collate
    scaled: Callable[[Any, float], Any] = field(default=lambda item, factor: (item[0] * factor, *item[1:]))
    state: bool = False
    cure: Step | None = None


@dataclass(frozen=True)
class Real:
    """A training on real data that shows its coupling only in some draws.

    Attributes:
        name: what couples the samples.
        before: what was measured with commit b9aaa67, which accepted it.
        model: builds the model.
        items: builds the samples.
        loss: what the loop computes.
        last: the draw that shows the coupling.
        first: draws before it.
        collate: how samples become a batch.
        told: further arguments of the call.
        outside: parameters outside the model, with an optimizer of their own; what is measured is whether they move.
    """

    name: str
    before: str
    model: Callable[[], nn.Module]
    items: Callable[[], list[Any]]
    loss: Step
    last: tuple[int, ...]
    first: tuple[tuple[int, ...], ...] = ((1, 2, 3, 4), (5, 6, 7))
    collate: Collate = default_collate
    told: dict[str, Any] = field(default_factory=dict)
    outside: Tensor | None = None


# ------------------------------------------------------------------ both libraries


def plain_opacus(setup: Setup) -> Made:
    model = setup.model().train()
    model = ModuleValidator.fix(model) if ModuleValidator.validate(model, strict=False) else model
    return with_opacus(model, loader(setup), 0.1, noise_multiplier=0.0, poisson_sampling=False)


def through_dpfix(setup: Setup) -> Made:
    model = setup.model().train()
    return with_dpfix(model, loader(setup), 0.1, setup.loss, noise_multiplier=0.0, poisson_sampling=False)


def loader(setup: Setup) -> DataLoader[Any]:
    return DataLoader(setup.items(), batch_size=4, collate_fn=setup.collate)  # type: ignore[arg-type]


# ------------------------------------------------------------------ measuring


def released_sum(setup: Setup, made: Made, items: list[Any], clip_norm: float) -> Gradients:
    """The sum that would be released for a batch of these samples."""
    torch.manual_seed(0)
    return released(made.model, made.optimizer, setup.loss, setup.collate(items), clip_norm)


def sensitivity(setup: Setup, made: Made) -> float:
    """The largest movement of the released sum, as a multiple of the clip norm."""
    items = setup.items()
    worst = 0.0
    for i, scale, clip_norm in ((i, s, c) for i in range(len(items)) for s in SCALES for c in CLIP_NORMS):
        changed = [setup.scaled(item, scale) if j == i else item for j, item in enumerate(items)]
        whole = released_sum(setup, made, changed, clip_norm)
        rest = released_sum(setup, made, changed[:i] + changed[i + 1 :], clip_norm)
        moved = distance(whole, rest) / clip_norm
        worst = max(worst, moved) if moved == moved else float("nan")
        if worst != worst:
            return worst
    return worst


def leaks(setup: Setup, make: Callable[[Setup], Made]) -> bool:
    """Whether a step leaves other buffers or attributes, or forward other parameters, with and without a sample."""
    items = setup.items()
    states = []
    for batch in (items, items[1:]):
        torch.manual_seed(0)
        made = make(setup)
        loss = setup.loss(made.model, setup.collate(batch))
        found = {name: p.detach().clone() for name, p in made.model.named_parameters()}
        loss.backward()
        made.optimizer.step()
        for path, module in made.model.named_modules():
            for name, value in {**vars(module), **module._buffers}.items():
                if isinstance(value, Tensor):
                    found[f"{path}.{name}"] = value.detach().clone()
        states.append(found)
    return any(n not in states[1] or not torch.equal(t, states[1][n]) for n, t in states[0].items())


def opacus_cell(setup: Setup) -> str:
    try:
        torch.manual_seed(0)
        if setup.state:
            leaking = leaks(setup, plain_opacus)
            return "trains; what forward writes tells a sample" if leaking else "trains; nothing is written"
        return f"{sensitivity(setup, plain_opacus(setup)):.2f} C"
    except FAILURES as error:
        return f"stops: {type(error).__name__}: {short(str(error), 70, '...')}"


def dpfix_cell(setup: Setup) -> tuple[str, bool]:
    torch.manual_seed(0)
    try:
        made = through_dpfix(setup)
    except dpfix.DPFixError as error:
        text = f"refused: `{type(error).__name__}`: {short(str(error).splitlines()[0], 150, '...')}"
        return text + cured(setup), True
    if setup.state:
        leak = leaks(setup, through_dpfix)
        return ("trains, and state leaks" if leak else "trains; nothing is written"), not leak
    found = sensitivity(setup, made)
    return f"trains: {found:.2f} C", found <= 1 + 1e-3


def cured(setup: Setup) -> str:
    """What the set-up costs once it is written as the message says."""
    if setup.cure is None:
        return ""
    other = Setup(setup.group, setup.name, setup.model, setup.items, setup.cure, setup.collate, setup.scaled)
    torch.manual_seed(0)
    return f"; with `dpfix.PerSampleLoss`: {sensitivity(other, through_dpfix(other)):.2f} C"


# ------------------------------------------------------------------ real steps


def last_step(setup: Real, make: Callable[[Real], Made], draws: list[tuple[int, ...]], clip_norm: float) -> Gradients:
    """What the last step of a training over these draws releases, as a sum; SGD moves by it."""
    torch.manual_seed(0)
    made = make(setup)
    made.optimizer.max_grad_norm = clip_norm
    vars(made.loader)["batch_sampler"] = [list(draw) for draw in draws]
    others = [] if setup.outside is None else [torch.optim.SGD([setup.outside], lr=0.1)]
    moved: Gradients = {}
    for number, batch in enumerate(made.loader):
        torch.manual_seed(number)
        for optimizer in (made.optimizer, *others):
            optimizer.zero_grad()
        before = {n: p.detach().clone() for n, p in made.model.named_parameters()}
        setup.loss(made.model, batch).backward()
        for optimizer in (made.optimizer, *others):
            optimizer.step()
        moved = {n: before[n] - p.detach() for n, p in made.model.named_parameters()}
    return {n: m * made.optimizer.expected_batch_size for n, m in moved.items()}


def real_sensitivity(setup: Real, make: Callable[[Real], Made]) -> float:
    """As :func:`sensitivity`, for the last draw."""
    worst = 0.0
    for clip_norm in CLIP_NORMS:
        whole = last_step(setup, make, [*setup.first, setup.last], clip_norm)
        for left_out in setup.last:
            draws = [*setup.first, tuple(i for i in setup.last if i != left_out)]
            worst = max(worst, distance(whole, last_step(setup, make, draws, clip_norm)) / clip_norm)
    return worst


def real_cell(setup: Real, make: Callable[[Real], Made]) -> str:
    if setup.outside is None:
        return f"{real_sensitivity(setup, make):.2f} C"
    before = setup.outside.detach().clone()
    last_step(setup, make, [*setup.first, setup.last], 1.0)
    return "moves without noise" if not torch.equal(before, setup.outside) else "stays"


def real_opacus(setup: Real) -> Made:
    return with_opacus(setup.model().train(), real_loader(setup), 1.0, noise_multiplier=0.0)


def real_dpfix(setup: Real) -> Made:
    model = setup.model().train()
    made = dpfix.make_private_safe(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0), data_loader=real_loader(setup),
        noise_multiplier=0.0, max_grad_norm=1.0, **setup.told,
    )  # fmt: skip
    return Made(*made, made[0].to_standard_module, made.plan.engine, made.privacy_engine.accountant, made.report)


def real_loader(setup: Real) -> DataLoader[Any]:
    return DataLoader(setup.items(), batch_size=6, collate_fn=setup.collate)  # type: ignore[arg-type]


def real_row(setup: Real) -> tuple[str, bool]:
    try:
        opacus = real_cell(setup, real_opacus)
    except FAILURES as error:
        opacus = f"stops: {type(error).__name__}: {short(str(error), 70, '...')}"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=DPFixWarning)
        try:
            now, right = real_cell(setup, real_dpfix), False
            right = now == "stays" or (now.endswith(" C") and float(now[:-2]) <= 1 + 2e-3)
            now = f"trains: {now}"
        except (dpfix.DPFixError, DPFixWarning) as error:
            kind = "warned" if isinstance(error, DPFixWarning) else f"refused: `{type(error).__name__}`"
            now, right = f"{kind}: {short(str(error).splitlines()[0], 150, '...')}", True
    return tables.row(setup.name, opacus, setup.before, now), right


# ------------------------------------------------------------------ samples


def points(count: int = 8) -> list[Any]:
    """Points of which one is unlike the others, with a rare class."""
    draw = torch.Generator().manual_seed(1)
    return [(torch.randn(6, generator=draw) * (0.3 + i), 0 if i < 5 else 1 + i % 2) for i in range(count)]


def alike() -> list[Any]:
    """Points that are all alike but for one, with a rare class: their gradients add up."""
    draw = torch.Generator().manual_seed(1)
    base = torch.randn(6, generator=draw)
    return [(base + 0.1 * torch.randn(6, generator=draw), int(i == 7)) for i in range(8)]


def patches() -> list[Any]:
    """Patches of which only the first two have a structure in them."""
    draw = torch.Generator().manual_seed(1)
    masks = [(torch.rand(1, 8, 8, generator=draw) < 0.05 * (i < 2)).float() for i in range(8)]
    return [(torch.randn(2, 8, 8, generator=draw), mask) for mask in masks]


def tokens() -> list[Any]:
    """Sequences with one valid target each, but for one with thirty."""
    draw = torch.Generator().manual_seed(1)
    base = torch.randn(6, generator=draw)
    out = []
    for i in range(8):
        y = torch.zeros(30, dtype=torch.long)
        if i:
            y[1:] = -100
        out.append((base + 0.1 * torch.randn(30, 6, generator=draw), y))
    return out


def sequences() -> list[Any]:
    draw = torch.Generator().manual_seed(1)
    return [(torch.randn(5, 6, generator=draw) * (0.3 + i), i % 3) for i in range(8)]


def survivals() -> list[Any]:
    draw = torch.Generator().manual_seed(1)
    return [(torch.randn(6, generator=draw), torch.rand((), generator=draw)) for _ in range(8)]


# ------------------------------------------------------------------ models


class Around(nn.Module):
    """A layer with something around it in the middle."""

    def __init__(self, middle: nn.Module, width: int = 8) -> None:
        super().__init__()
        self.stem, self.middle, self.head = nn.Linear(6, 8), middle, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.middle(self.stem(x))))


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class OwnBatchNorm(nn.BatchNorm1d):
    """A subclass, which exact type look-ups miss."""


def frozen_norm() -> nn.Module:
    model = Around(nn.BatchNorm1d(8))
    model.middle.requires_grad_(False)
    return model


def minibatch_std(x: Tensor) -> Tensor:
    return torch.cat([x, x.std(0, correction=0).add(1e-6).mean().expand(len(x), 1)], 1)


def hand_norm(x: Tensor) -> Tensor:
    return (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()


class TwoRows(Around):
    """Stacks a changed copy of every sample below the batch."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.cat([x, x.flip(1)]))


class FlatTokens(nn.Module):
    """Flattens the tokens before a head; the backbone is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = nn.Linear(6, 8).requires_grad_(False), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.backbone(x)).flatten(0, 1))


class TimeFirst(nn.Module):
    """Works on ``[time, batch, features]`` inside."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x.transpose(0, 1)))).mean(0)


class Packed(nn.Module):
    """Packs sequences that are not sorted by length."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        lengths = [1 + (3 * i) % 5 for i in range(len(x))]
        packed = pack_padded_sequence(x, torch.tensor(lengths), batch_first=True, enforce_sorted=False)
        return self.head(self.rnn(packed)[1][0][-1])


class Written(nn.Module):
    """Writes something about the batch in forward."""

    def __init__(self, write: Callable[[Any, Tensor], None]) -> None:
        super().__init__()
        self.stem, self.head, self.write = nn.Linear(6, 8), nn.Linear(8, 3), write
        self.register_buffer("average", torch.zeros(8))
        self.register_buffer("codes", torch.randn(4, 8))
        self.last = torch.zeros(1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        with torch.no_grad():
            self.write(self, h.detach())
        return self.head(torch.relu(h))


def codebook(model: Any, h: Tensor) -> None:
    nearest = torch.cdist(h, model.codes).argmin(1)
    model.codes.index_add_(0, nearest, 0.1 * (h - model.codes[nearest]))


def segmenter() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 1, 1))


def in_a_row(label: Callable[[int], Any]) -> list[Any]:
    """Points of one kind with labels by their number; the first ten show nothing."""
    draw = torch.Generator().manual_seed(1)
    base = torch.randn(6, generator=draw)
    return [(base + 0.3 * torch.randn(6, generator=draw), label(i)) for i in range(24)]


def later_padded() -> list[Any]:
    draw = torch.Generator().manual_seed(1)
    out = []
    base = torch.randn(6, generator=draw)
    for i in range(24):
        y = torch.zeros(20, dtype=torch.long)
        y[20 if i < 11 else 1 :] = -100
        out.append((base + 0.3 * torch.randn(20, 6, generator=draw), y))
    return out


def with_gaps(value: float) -> list[Any]:
    def target(i: int) -> Tensor:
        return torch.tensor([3.0, *([float(i)] * 4 if i < 11 else [value] * 4)])

    return in_a_row(target)


def with_counts() -> list[Any]:
    return [(x, y, 20 if i == 10 else 2) for i, (x, y) in enumerate(in_a_row(lambda i: i % 3))]


def counts_as_list(items: list[Any]) -> Any:
    x, y, n = zip(*items, strict=True)
    return torch.stack(x), torch.tensor(y), list(n)


def with_offset() -> list[Any]:
    draw = torch.Generator().manual_seed(1)
    return [(2e3 + torch.randn(8, 6, generator=draw), i % 3) for i in range(24)]


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


# ------------------------------------------------------------------ losses


def with_loss(loss: Callable[..., Tensor]) -> Step:
    return lambda model, batch: loss(model(batch[0]), batch[1])


def per_token(loss: Callable[..., Tensor]) -> Step:
    return lambda model, batch: loss(model(batch[0]).transpose(1, 2), batch[1])


def views(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    return model(batch[0]), model(batch[0] * 0.9 + 0.1)


def info_nce(model: nn.Module, batch: Any) -> Tensor:
    a, b = (F.normalize(z, dim=1) for z in views(model, batch))
    return F.cross_entropy(a @ b.t() / 0.2, torch.arange(len(a)))


def barlow(model: nn.Module, batch: Any) -> Tensor:
    a, b = (hand_norm(z) for z in views(model, batch))
    return (a.t() @ b / len(a) - torch.eye(3)).square().sum()


def vicreg(model: nn.Module, batch: Any) -> Tensor:
    a, b = views(model, batch)
    spread = sum(F.relu(1 - (z.var(0, correction=0) + 1e-4).sqrt()).mean() for z in (a, b))
    return F.mse_loss(a, b) + spread


def cox(model: nn.Module, batch: Any) -> Tensor:
    """Partial likelihood: the risk set of a patient is everyone who lived longer."""
    risk, order = model(batch[0])[:, 0], batch[1].argsort(descending=True)
    return -(risk[order] - risk[order].logcumsumexp(0)).mean()


def top_k(model: nn.Module, batch: Any) -> Tensor:
    losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    return losses.topk(max(1, len(losses) // 3)).values.mean()


def mixed_up(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    out = model(0.7 * x + 0.3 * x.flip(0))
    return 0.7 * F.cross_entropy(out, y) + 0.3 * F.cross_entropy(out, y.flip(0))


def two_rows(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), torch.cat([batch[1], batch[1]]))


def flat_tokens(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1].repeat_interleave(batch[0].shape[1]))


def crops(items: list[Any]) -> Any:
    """As MONAI's ``list_data_collate``: four crops of every sample become four rows."""
    x = torch.stack([torch.roll(x, shift, 0) for x, _ in items for shift in range(4)])
    return x, torch.tensor([y for _, y in items for _ in range(4)])


def padded_mean(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]).reshape(-1, 3), batch[1].reshape(-1))


def padded_before(model: nn.Module, batch: Any) -> Tensor:
    y = batch[1].reshape(-1)
    return F.cross_entropy(model(batch[0]).reshape(-1, 3), y)


def over_tokens(model: nn.Module, batch: Any) -> Tensor:
    n = int((batch[1] != -100).sum())
    return F.cross_entropy(model(batch[0]).reshape(-1, 3), batch[1].reshape(-1), reduction="sum") / n


def over_sum_of_lengths(model: nn.Module, batch: Any) -> Tensor:
    x, y, n = batch
    each = F.cross_entropy(model(x), y, reduction="none")
    return (each * torch.tensor(n)).sum() / sum(n)


def over_the_present(model: nn.Module, batch: Any) -> Tensor:
    there = ~torch.isnan(batch[1])
    return (model(batch[0]) - torch.nan_to_num(batch[1]))[there].square().mean()


def imputed(model: nn.Module, batch: Any) -> Tensor:
    t = batch[1]
    return F.mse_loss(model(batch[0]), torch.where(torch.isnan(t), t.nanmean(), t))


def weighted_by_count(model: nn.Module, batch: Any) -> Tensor:
    n = torch.bincount(batch[1], minlength=3).float()
    weight = (1 / n.clamp(min=1))[batch[1]]
    return (weight * F.cross_entropy(model(batch[0]), batch[1], reduction="none")).mean()


def mixed_before(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(0.65 * x + 0.35 * x.roll(1, 0)), y)


def over_largest(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0] / batch[0].abs().max()), batch[1])


def with_penalty(model: nn.Module, batch: Any) -> Tensor:
    out = model(batch[0])
    z = out - out.mean(0)
    return F.cross_entropy(out, batch[1]) + 1e-3 * (z.T @ z / len(z)).square().mean()


def solved() -> nn.Module:
    model = nn.Linear(6, 3)
    with torch.no_grad():
        model.weight.copy_(30 * torch.eye(3, 6))
        model.bias.zero_()
    return model


def solved_points() -> list[Any]:
    return [(F.one_hot(torch.tensor(i % 3), 6).float(), i % 3) for i in range(24)]


class Mixes(nn.Module):
    """Mixes neighbours with probability one half."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.6 * x + 0.4 * x.roll(1, 0) if torch.rand(1).item() < 0.5 else x


def pairs_of_a_label(model: nn.Module, batch: Any) -> Tensor:
    f, y = model(batch[0]), batch[1]
    d = (f[:, None] - f[None]).square().sum(2)
    same, other = (y[:, None] == y[None]).float() - torch.eye(len(f)), (y[:, None] != y[None]).float()
    each = F.relu(d[:, :, None] - d[:, None, :] + 1.0) * same[:, :, None] * other[:, None, :]
    return each.sum() / (same[:, :, None] * other[:, None, :]).sum().clamp(min=1) + 1e-2 * f.square().sum(1).mean()


class FromStep:
    """The two hardest of the batch, after a warm-up of some steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        each = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
        self.step -= 1
        return each.mean() if self.step % 6 else each.topk(2).values.mean()


CENTRES = nn.Parameter(torch.zeros(3, 3))


def centre_loss(model: nn.Module, batch: Any) -> Tensor:
    out = model(batch[0])
    return F.cross_entropy(out, batch[1]) + 0.1 * (out - CENTRES[batch[1]]).square().sum(1).mean()


ARC = nn.Parameter(torch.linspace(-1, 1, 9).view(3, 3))


def arc_face(model: nn.Module, batch: Any) -> Tensor:
    """An additive angular margin to the class's own direction, which is learnt."""
    cosine = F.normalize(model(batch[0]), dim=1) @ F.normalize(ARC, dim=1).T
    own = F.one_hot(batch[1], 3).bool()
    return F.cross_entropy(8 * torch.where(own, (cosine.clamp(-0.99, 0.99).acos() + 0.2).cos(), cosine), batch[1])


DISCRIMINATOR = nn.Parameter(torch.linspace(-1, 1, 6))


def adversarial(model: nn.Module, batch: Any) -> Tensor:
    """An autoencoder, and a discriminator that learns on the real data beside it."""
    x, out = batch[0], model(batch[0])
    real, fake = (F.softplus(sign * (t @ DISCRIMINATOR)).mean() for sign, t in ((-1, x), (1, out)))
    return F.mse_loss(out, x) + 0.1 * (real + fake)


class Named(nn.Module):
    """Named inputs, and a loss of its own if it gets labels, as models of Hugging Face have."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = linear()

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.inner(inputs)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def named(items: list[Any]) -> dict[str, Tensor]:
    x, y = default_collate(items)
    return {"inputs": x, "labels": y}


def of_logits(model: nn.Module, batch: Any) -> Tensor:
    return HEAVY(model(**batch)["logits"], batch["labels"])


class MeanOverTime(nn.Module):
    """A mean over all places, padding included."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = linear()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).mean(1)


def trimmed(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    longest = int((x[:, :, 0] != 0).sum(1).max())
    return F.cross_entropy(model(x[:, :longest]), y)


class Unpadded(nn.Module):
    """Padding is taken out, and what is left is put into as many rows as there are samples."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.stem(x)[x[:, :, 0] != 0]
        return self.head(torch.tanh(z[: len(z) // len(x) * len(x)].view(len(x), -1, 8)).mean(1))


def later_short() -> list[Any]:
    draw = torch.Generator().manual_seed(1)
    out = []
    for i in range(24):
        x = 1 + 0.3 * torch.randn(6, 6, generator=draw)
        x[4 if i < 11 else 2 + 4 * (i % 2) :] = 0
        out.append((x, i % 3))
    return out


def sup_con(model: nn.Module, batch: Any) -> Tensor:
    """Supervised contrastive: every sample against all others of its label."""
    f, y = F.normalize(model(batch[0]), dim=1), batch[1]
    alone = torch.eye(len(f)).bool()
    log = (f @ f.T / 0.2).masked_fill(alone, -1e9).log_softmax(1)
    same = ((y[:, None] == y[None]) & ~alone).float()
    return -(same * log).sum() / same.sum().clamp(min=1) + 1e-2 * model(batch[0]).square().sum(1).mean()


def weights_in_collate(items: list[Any]) -> Any:
    x, y = default_collate(items)
    return x, y, (len(y) / torch.bincount(y, minlength=3).clamp(min=1))[y]


def with_weights(model: nn.Module, batch: Any) -> Tensor:
    x, y, weight = batch
    return (weight * F.cross_entropy(model(x), y, reduction="none")).mean()


class AgainstOffset(nn.Module):
    """A Linear layer on inputs with a large common offset, which the layers after it remove."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.a(x)
        return self.b(torch.tanh(z - z.mean(1, keepdim=True))[:, 0])


class SortedByLength(nn.Module):
    """Rows sorted by length in an LSTM, and put back after it."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(6, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        n = (x[:, :, 0] != 0).sum(1)
        order = n.argsort(descending=True, stable=True)
        h = self.rnn(pack_padded_sequence(x[order], n[order], batch_first=True))[1][0][-1]
        return self.head(h[order.argsort()])


def of_lengths() -> list[Any]:
    draw = torch.Generator().manual_seed(1)
    out = []
    for i in range(24):
        x = torch.randn(5, 6, generator=draw)
        x[1 + (3 * i) % 5 :] = 0
        out.append((x, i % 3))
    return out


WEIGHTED = nn.CrossEntropyLoss(weight=torch.tensor([0.02, 1.0, 1.0]))
TOKEN = nn.CrossEntropyLoss()
BATCH_DICE = DiceLoss(sigmoid=True, batch=True)
SUM = nn.CrossEntropyLoss(reduction="sum")
LAYER, LOSS, ROWS, STATE = "layers", "losses", "rows that are not samples", "state written in forward"


def layer(name: str, model: Callable[[], nn.Module], loss: Step = classify) -> Setup:
    return Setup(LAYER, name, model, points, loss)


SETUPS = (
    layer("`BatchNorm1d(affine=False)`", lambda: Around(nn.BatchNorm1d(8, affine=False))),
    layer("BatchNorm, frozen, in train mode", frozen_norm),
    layer("a subclass of BatchNorm", lambda: Around(OwnBatchNorm(8))),
    layer("`F.batch_norm(training=True)`", lambda: Around(Function(lambda x: F.batch_norm(x, None, None, training=True)))),
    layer("hand-written batch norm", lambda: Around(Function(hand_norm))),
    layer("`x - x.mean(0)`", lambda: Around(Function(lambda x: x - x.mean(0)))),
    layer("minibatch standard deviation", lambda: Around(Function(minibatch_std), 9)),
    layer("mixup inside the batch", linear, mixed_up),
    Setup(LOSS, "batch Dice, mostly empty patches", segmenter, patches, with_loss(BATCH_DICE),
          cure=with_loss(dpfix.PerSampleLoss(BATCH_DICE))),
    Setup(LOSS, "class weights with a mean", linear, alike, with_loss(WEIGHTED),
          cure=with_loss(dpfix.PerSampleLoss(WEIGHTED))),
    Setup(LOSS, "mean over valid tokens (`ignore_index`)", linear, tokens, per_token(TOKEN),
          cure=per_token(dpfix.PerSampleLoss(TOKEN))),
    Setup(LOSS, "InfoNCE / NT-Xent", linear, points, info_nce),
    Setup(LOSS, "Barlow Twins", linear, points, barlow),
    Setup(LOSS, "VICReg", linear, points, vicreg),
    Setup(LOSS, "Cox partial likelihood", linear, survivals, cox),
    Setup(LOSS, "TopK over the batch", linear, points, top_k),
    Setup(LOSS, '`reduction="sum"` announced as mean', linear, alike, with_loss(SUM),
          cure=with_loss(dpfix.PerSampleLoss(SUM))),
    Setup(ROWS, "four crops per sample (`list_data_collate`)", linear, points, classify, collate=crops),
    Setup(ROWS, "`cat([x, aug(x)])`", TwoRows, points, two_rows),
    Setup(ROWS, "tokens flattened before a head, frozen backbone", FlatTokens, sequences, flat_tokens),
    Setup(ROWS, "undeclared `[time, batch, features]`", TimeFirst, sequences, classify),
    Setup(ROWS, "packed sequences, `enforce_sorted=False`", Packed, sequences, classify),
    Setup(STATE, "average of activations (EMA buffer)", lambda: Written(lambda m, h: m.average.lerp_(h.mean(0), 0.1)),
          points, classify, state=True),
    Setup(STATE, "codebook", lambda: Written(codebook), points, classify, state=True),
    Setup(STATE, "tensor kept as an attribute", lambda: Written(lambda m, h: setattr(m, "last", h)), points, classify,
          state=True),
    Setup(STATE, "BatchNorm's running statistics", lambda: Around(nn.BatchNorm1d(8, affine=False)), points, classify,
          state=True),
    Setup(STATE, "`Embedding(max_norm=...)`",
          lambda: nn.Sequential(nn.Embedding(20, 4, max_norm=0.5), nn.Flatten(), nn.Linear(8, 3)),
          lambda: [(torch.tensor([2 * i, 2 * i + 1]), i % 3) for i in range(8)], classify, state=True),
)  # fmt: skip


SHOWS = (1, 2, 11, 12, 13)
CE = nn.CrossEntropyLoss()
HEAVY, IGNORE = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 1.0, 20.0])), nn.CrossEntropyLoss(ignore_index=2)


def rare(i: int) -> int:
    return 2 if i in {11, 12} else 0


REAL = (
    Real("tokens padded with -100, step told", "1.88 C", linear, later_padded, padded_mean, SHOWS,
         told={"training_step": padded_mean}),
    Real("sum over `sum(lengths)`", "9.2-12.1 C", linear, with_counts, over_sum_of_lengths, (1, 2, 3, 10),
         collate=counts_as_list),
    Real("missing targets (NaN) masked", "1.2 C", lambda: nn.Linear(6, 5), lambda: with_gaps(float("nan")),
         over_the_present, SHOWS),
    Real("missing targets imputed by the mean of the batch", "1.8 C", lambda: nn.Linear(6, 5),
         lambda: with_gaps(float("nan")), imputed, SHOWS),
    Real("rare class with a large weight", "2.18 C", linear, lambda: in_a_row(rare), with_loss(HEAVY), SHOWS,
         told={"criterion": HEAVY}),
    Real("rare label ignored", "1.06 C", linear, lambda: in_a_row(rare), with_loss(IGNORE), SHOWS,
         told={"criterion": IGNORE}),
    Real("labels flattened before the model", "1.0-2.3 C", linear, later_padded, padded_before, SHOWS),
    Real("labels counted before the model", "1.0-2.3 C", linear, lambda: in_a_row(lambda i: i % 3), weighted_by_count,
         (1, 2, 4, 7, 10)),
    Real("criterion told, another loss computed", "1.5 C", linear, lambda: in_a_row(rare), with_loss(HEAVY), SHOWS,
         told={"criterion": CE}),
    Real('`sum / n_tokens` with `loss_reduction="sum"`', "2.42 C", linear, later_padded, over_tokens, SHOWS,
         told={"loss_reduction": "sum"}),
    Real("mixup in the loop", "1.3-2.1 C", linear, lambda: in_a_row(lambda i: i % 3), mixed_before, SHOWS),
    Real("`x / x.max()`", "1.3-2.1 C", linear, points, over_largest, (1, 2, 3, 7), first=((1, 2, 3), (4, 5))),
    Real("in-batch negatives", "1.3-2.1 C", linear, lambda: in_a_row(lambda i: i % 3), info_nce, SHOWS),
    Real("covariance penalty of weight 1e-3, task solved", "1.5-2.6 C", solved, solved_points, with_penalty, (0, 3, 6, 7)),
    Real("a random branch that mixes", "1.6-3.0 C",
         lambda: nn.Sequential(nn.Linear(6, 8), Mixes(), nn.Tanh(), nn.Linear(8, 3)),
         lambda: in_a_row(lambda i: i % 3), classify, SHOWS),
    Real("triplets of a label, many classes", "2.0-3.4 C", linear, lambda: in_a_row(lambda i: i if i < 11 else 11 + i % 2),
         pairs_of_a_label, SHOWS),
    Real("rows sorted by length in an LSTM", "1.2 C", SortedByLength, of_lengths, classify, SHOWS),
    Real("the two hardest from some step on", "1.1-1.9 C", linear, lambda: in_a_row(lambda i: i % 3), FromStep(6), SHOWS,
         first=((1, 2, 3), (4, 5, 6), (7, 8, 9), (1, 4, 7), (2, 5, 8))),
    Real("centre loss with an optimizer of its own", "un-noised", linear, lambda: in_a_row(lambda i: i % 3), centre_loss,
         SHOWS, outside=CENTRES),
    Real("ArcFace with an optimizer of its own", "un-noised", linear, lambda: in_a_row(lambda i: i % 3), arc_face,
         SHOWS, outside=ARC),
    Real("discriminator on real data", "un-noised", lambda: nn.Linear(6, 6), lambda: in_a_row(lambda i: i % 3), adversarial,
         SHOWS, outside=DISCRIMINATOR),
    Real("Hugging Face form, another loss of `.logits`", "1.5 C", Named, lambda: in_a_row(rare), of_logits, SHOWS,
         collate=named),
    Real("trim to the longest before a model without a mask", "1.3-2.1 C", MeanOverTime, later_short, trimmed, SHOWS),
    Real("`z[mask]` unpadding, viewed as rows", "2.0 C", Unpadded, later_short, classify, SHOWS),
    Real("SupCon, many classes", "2.0-3.4 C", linear, lambda: in_a_row(lambda i: i if i < 11 else 11 + i % 2), sup_con,
         SHOWS),
    Real("class weights counted in `collate_fn`", "accepted", linear, lambda: in_a_row(lambda i: i % 3), with_weights,
         (1, 2, 4, 7, 10), collate=weights_in_collate),
    Real("Linear on inputs with a large offset", "1.57 C", AgainstOffset, with_offset, classify, SHOWS),
)  # fmt: skip


def real_lines(only: str) -> Iterator[tuple[str, bool]]:
    """The table of real data, as :func:`lines`."""
    for text in tables.head("", "plain Opacus", "dpfix b9aaa67", "dpfix now"):
        yield text, True
    for setup in REAL:
        if only.lower() in setup.name.lower():
            yield real_row(setup)


def lines(only: str) -> Iterator[tuple[str, bool]]:
    """The table, line by line, and whether dpfix keeps the promise."""
    for text in tables.head("", "plain Opacus", "dpfix"):
        yield text, True
    group = ""
    for setup in SETUPS:
        if only.lower() not in setup.name.lower():
            continue
        if setup.group != group:
            group = setup.group
            yield tables.row(f"**{group}**", "", ""), True
        told, right = dpfix_cell(setup)
        yield tables.row(setup.name, opacus_cell(setup), told), right


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="set-ups whose name contains this text")
    parser.add_argument("--write", type=Path, help="file for the table")
    arguments = parser.parse_args()
    quiet()
    table, wrong = [], 0
    for text, right in chain(lines(arguments.only), ((text, True) for text in SECOND), real_lines(arguments.only)):
        print(text, flush=True)
        table.append(text)
        wrong += not right
    if arguments.write is not None:
        arguments.write.write_text(PAGE + "\n".join(table) + "\n")
    return int(wrong > 0)


SECOND = """
## On real data

Here a coupling shows only in some draws, or in what the loop computes and the call was not told. A few draws that show
nothing come first; the sensitivity is that of the step on the one that does. The measurements of commit b9aaa67, which
accepted all of these, were made on larger sets of the same kinds; the others are those of this table's set-ups. Numbers of Python
can be followed by their value only: there a warning that names the place may stand for a refusal.
""".splitlines()

PAGE = """# One sample feels another

Written by `python -m benchmarks.coupled --write docs/coupled.md`.

*Sensitivity*: how far leaving one sample out moves the sum that is released before noise, as a multiple of the clip
norm C: the worst over every sample, that sample as it is and 50 times as large, and seven C from 0.01 to 10. DP-SGD needs
at most 1. Plain Opacus 1.6.0 gets the model after `ModuleValidator.fix`, with `grad_sample_mode="hooks"`.

"""

if __name__ == "__main__":
    sys.exit(main())

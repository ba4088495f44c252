"""A canary: how well can be told from trained weights whether one record was in the training?

A training is (epsilon, delta)-private only if no test of its outcome has ``P(says in | in) > e^epsilon P(says in | out) +
delta``, or the same with *in* and *out* exchanged. Many short trainings of a tiny model give a lower bound on epsilon
(Jagielski et al. 2020, https://arxiv.org/abs/2006.07709; Nasr et al. 2021, https://arxiv.org/abs/2101.04535): the threshold
is chosen on one half of them; on the other half, Clopper-Pearson bounds of both probabilities hold together with 95 %.

The canary is the only record with a value in feature 0, and larger than any other: it alone moves the weights of that feature,
and it is clipped. Where it is out, its place holds a record of zeros, whose gradient is zero. Every record is in every batch (a
sampling rate of 1), where the claim is as tight as it can be.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from opacus import PrivacyEngine
from scipy import stats
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

import dpfix
from benchmarks.common import tables
from benchmarks.soak.part import Part

RECORDS, FEATURES, CLASSES, CROPS = 8, 6, 3, 4
STEPS, MULTIPLIER, NORM, LR, DELTA = 2, 2.1, 1.0, 1e-3, 1e-3
CONFIDENCE = 0.95

Scores = NDArray[np.float64]


def _together(items: list[Any]) -> Any:
    """A batch of the crops of all items, as a collate function for contrastive learning or detection has it."""
    return default_collate([crop for item in items for crop in item])


def _loader(inside: bool, crops: int) -> DataLoader[Any]:
    draw = torch.Generator().manual_seed(7)
    records = [torch.randn(FEATURES, generator=draw) for _ in range(RECORDS)]
    for x in records:
        x[0] = 0.0
    records[0] = torch.eye(FEATURES)[0] * 10.0 if inside else torch.zeros(FEATURES)
    items = [[(x, i % CLASSES)] * crops for i, x in enumerate(records)]
    return DataLoader(items, batch_size=RECORDS, collate_fn=_together)  # type: ignore[arg-type]


def with_dpfix(
    model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader[Any]
) -> tuple[Any, PrivacyEngine]:
    made = dpfix.make_private_safe(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        noise_multiplier=MULTIPLIER,
        max_grad_norm=NORM,
        criterion=nn.CrossEntropyLoss(),
        grad_sample_mode="bookkeeping",
        cache=False,
    )
    return made, made.privacy_engine


def with_opacus(
    model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader[Any]
) -> tuple[Any, PrivacyEngine]:
    engine = PrivacyEngine()
    made = engine.make_private(
        module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=MULTIPLIER, max_grad_norm=NORM
    )
    return made, engine


Library = Callable[..., tuple[Any, PrivacyEngine]]


def score(library: Library, inside: bool, crops: int) -> tuple[float, PrivacyEngine]:
    """One training: how far the weights went the way of the canary, in clip norms, and the engine that accounted it."""
    model = nn.Linear(FEATURES, CLASSES, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    (private, stepping, loader), engine = library(model, optimizer, _loader(inside, crops))
    made = 0
    while made < STEPS:
        for x, y in loader:
            stepping.zero_grad()
            F.cross_entropy(private(x), y).backward()
            stepping.step()
            made += 1
    way = torch.full((CLASSES,), -1.0 / CLASSES)
    way[0] += 1.0
    moved: Tensor = model.weight.detach()[:, 0] / LR * stepping.expected_batch_size / NORM
    return float(moved @ way / way.norm()), engine


@dataclass(frozen=True)
class Bound:
    """What trainings with and without the canary tell about epsilon.

    Attributes:
        epsilon: the lower bound.
        right: how often the canary is found where it is, on the half that counts.
        false: how often it is found where it is not.
    """

    epsilon: float
    right: float
    false: float


def lower_bound(inside: Scores, outside: Scores) -> Bound:
    """The lower bound on epsilon; the halves of the scores have different parts in it."""
    half = len(inside) // 2
    thresholds = np.sort(np.concatenate([inside[:half], outside[:half]]))
    tests = [(t, direction) for t in thresholds for direction in (1, -1)]
    t, direction = max(tests, key=lambda test: _epsilon(inside[:half], outside[:half], *test))
    kept = inside[half:], outside[half:]
    return Bound(max(0.0, _epsilon(*kept, t, direction)), float(np.mean(kept[0] > t)), float(np.mean(kept[1] > t)))


def _epsilon(inside: Scores, outside: Scores, threshold: float, direction: int) -> float:
    """Of the test that says *in* above the threshold, or of the one that says *out* below it."""
    hits, false = (
        (inside > threshold, outside > threshold) if direction > 0 else (outside <= threshold, inside <= threshold)
    )
    error = (1 - CONFIDENCE) / 2
    low = stats.beta.ppf(error, hits.sum(), len(hits) - hits.sum() + 1) if hits.any() else 0.0
    high = stats.beta.ppf(1 - error, false.sum() + 1, len(false) - false.sum()) if not false.all() else 1.0
    return math.log((low - DELTA) / high) if low > DELTA else -math.inf


ROWS: tuple[tuple[str, Library, int, bool], ...] = (
    ("dpfix, one row per record", with_dpfix, 1, False),
    (f"dpfix, {CROPS} crops per record", with_dpfix, CROPS, False),
    ("plain Opacus, one row per record", with_opacus, 1, False),
    (f"plain Opacus, {CROPS} crops per record, each clipped by itself", with_opacus, CROPS, True),
)
"""Name, library, crops, and whether the canary has to show that the claim does not hold."""


def measure(
    trainings: int, of_opacus: int | None = None, rows: tuple[tuple[str, Library, int, bool], ...] = ROWS
) -> Part:
    """Bounds on epsilon.

    Args:
        trainings: how many with the canary, and as many without it.
        of_opacus: the same for plain Opacus, which is faster.
        rows: of the table.
    """
    titles = (
        "training",
        "with and without the canary each",
        "canary found, where it is",
        "where it is not",
        "epsilon claimed",
        "epsilon at least",
        "claim",
    )
    lines, wrong = tables.head(*titles), []
    for name, library, crops, broken in rows:
        number = of_opacus if of_opacus is not None and library is with_opacus else trainings
        made = [[score(library, inside, crops) for _ in range(number)] for inside in (True, False)]
        claimed = min(side[-1][1].get_epsilon(DELTA) for side in made)
        bound = lower_bound(*(np.array([value for value, _ in side]) for side in made))
        refuted = bound.epsilon > claimed
        verdict = "**does not hold**" if refuted else "not refuted"
        lines.append(
            tables.row(
                name, f"{number:,}", f"{bound.right:.1%}", f"{bound.false:.1%}", f"{claimed:.2f}", f"{bound.epsilon:.2f}", verdict
            )
        )  # fmt: skip
        if refuted != broken:
            wrong.append(f"{name}: epsilon is at least {bound.epsilon:.2f}, and {claimed:.2f} is claimed")
    size = f"{STEPS} steps in each training; delta = {DELTA:g}."
    return Part([size, "", *lines], wrong)

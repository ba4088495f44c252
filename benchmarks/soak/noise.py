"""The noise that leaves the optimizer, for every engine and clipping: its size, its distribution, its independence.

No sample moves the model (its loss is multiplied by 0), so that what leaves the optimizer is noise and nothing else. What it
should be is computed here from the papers' formulas, not asked from dpfix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn
from torch.utils.data import DataLoader

import dpfix
from benchmarks.common import tables
from benchmarks.soak.part import Part
from dpfix.engines import BY_HAND, BY_NAME

ENGINES = tuple(name for name in BY_NAME if name != BY_HAND.name)
MULTIPLIER, NORM, ITEMS, BATCH, COUNT_STD = 1.3, 0.7, 24, 8, 1.5
CLIPPINGS: dict[str, dict[str, Any]] = {
    "flat": {"max_grad_norm": NORM},
    "per_layer": {"clipping": "per_layer", "max_grad_norm": [0.3, 0.4, 0.5, 0.6]},
    "adaptive": {
        "clipping": "adaptive", "max_grad_norm": NORM, "target_unclipped_quantile": 0.5, "clipbound_learning_rate": 0.2,
        "max_clipbound": 10.0, "min_clipbound": 0.01, "unclipped_num_std": COUNT_STD,
    },
}  # fmt: skip
LARGEST_DEVIATION = 0.01
"""Of the standard deviation from the claimed one."""
SMALLEST_P, LARGEST_Z = 1e-6, 5.0
"""Where right noise would be called wrong: about once in 100,000 runs of the whole table."""


def claimed(optimizer: Any, clipping: str) -> float:
    """Standard deviation of what the next release adds to the clipped sum.

    Args:
        optimizer: the private optimizer.
        clipping: how it clips.

    Returns:
        ``sigma C``; per layer, C is the norm of all clip norms together; with adaptive clipping, where the count of
        unclipped samples takes its part, sigma is ``(z^-2 - (2 sigma_b)^-2)^-1/2`` (Andrew et al. 2021, theorem 1).
    """
    if clipping == "per_layer":
        return MULTIPLIER * math.hypot(*CLIPPINGS[clipping]["max_grad_norm"])
    if clipping == "adaptive":
        return (MULTIPLIER**-2 - (2 * COUNT_STD) ** -2) ** -0.5 * float(optimizer.max_grad_norm)
    return MULTIPLIER * NORM


def releases(engine: str, clipping: str, steps: int, **options: Any) -> Tensor:
    """Noise of so many steps in units of the claimed standard deviation, ``[steps, parameters]``."""
    model = nn.Sequential(nn.Linear(6, 400), nn.Linear(400, 3))
    items = [(torch.randn(6), i % 3) for i in range(ITEMS)]
    private, optimizer, loader = dpfix.make_private_safe(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
        data_loader=DataLoader(items, batch_size=BATCH),  # type: ignore[arg-type]
        noise_multiplier=MULTIPLIER,
        criterion=nn.CrossEntropyLoss(),
        grad_sample_mode=engine,
        cache=False,
        **CLIPPINGS[clipping],
        **options,
    )
    seen: list[Tensor] = []
    while len(seen) < steps:
        for x, y in loader:
            std = claimed(optimizer, clipping) / BATCH
            optimizer.zero_grad()
            (F.cross_entropy(private(x), y) * 0).backward()
            optimizer.step()
            seen.append(torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None]) / std)
    return torch.stack(seen[:steps])


@dataclass(frozen=True)
class Statistics:
    """Of noise in units of its claimed standard deviation.

    Attributes:
        numbers: how many there are.
        deviation: relative, of the standard deviation from the claimed one.
        p: of the Kolmogorov-Smirnov test against the standard normal distribution.
        correlation: of each number with that of the same parameter in the next step.
        z: the correlation as a multiple of its standard error.
    """

    numbers: int
    deviation: float
    p: float
    correlation: float
    z: float

    @classmethod
    def of(cls, noise: Tensor) -> Statistics:
        flat = noise.flatten().numpy()
        pairs = np.corrcoef(noise[:-1].flatten().numpy(), noise[1:].flatten().numpy())
        correlation = float(pairs[0, 1])
        p = float(stats.kstest(flat, "norm").pvalue)
        deviation = float(np.sqrt(np.mean(flat * flat))) - 1
        return cls(flat.size, deviation, p, correlation, correlation * math.sqrt(noise[1:].numel()))

    def wrong(self) -> list[str]:
        found = []
        if not abs(self.deviation) <= LARGEST_DEVIATION:
            found.append(f"the standard deviation is off by {self.deviation:.2%}")
        if not self.p >= SMALLEST_P:
            found.append(f"it is not normal (p = {self.p:.1g})")
        if not abs(self.z) <= LARGEST_Z:
            found.append(f"consecutive steps are correlated ({self.correlation:.4f})")
        return found


def measure(steps: int, engines: tuple[str, ...] = ENGINES) -> Part:
    kinds = [(engine, clipping, {}) for engine in engines for clipping in CLIPPINGS]
    kinds.append((engines[0], "flat", {"secure_mode": True}))
    titles = (
        "engine", "clipping", "numbers", "std / claimed", "KS p-value", "correlation of consecutive steps",
        "in standard errors",
    )  # fmt: skip
    lines, wrong = tables.head(*titles), []
    for engine, clipping, options in kinds:
        name = f"{engine}, secure mode" if options else engine
        try:
            found = Statistics.of(releases(engine, clipping, steps, **options))
        except dpfix.DPFixError as refusal:
            lines.append(tables.row(name, clipping, f"refused: {tables.short(str(refusal), 60)}", "", "", "", ""))
            continue
        wrong += [f"noise of {name}, {clipping}: {fact}" for fact in found.wrong()]
        lines.append(
            tables.row(
                name, clipping, f"{found.numbers:,}", f"{1 + found.deviation:.4f}", f"{found.p:.2g}",
                f"{found.correlation:+.4f}", f"{found.z:+.1f}",
            )
        )  # fmt: skip
    return Part([f"{steps:,} steps of each.", "", *lines], wrong)

"""The table of the public families, and the page that it stands in."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

from benchmarks.common import tables
from benchmarks.zoo.measure import EXACT, REFUSED, SKIPPED, Row, short
from benchmarks.zoo.table import ROOT, environment, found, keep, verdict

KINDS = ("huggingface", "adapters", "vision", "plain")
PACKAGES = ("torch", "opacus", "transformers", "peft", "timm", "torchvision")


def lines(rows: Sequence[Row]) -> Iterator[str]:
    """The table."""
    yield from tables.head("network", "dpfix found", "engine", "step", "dpfix", "kept off `bookkeeping`")
    task = ""
    for row in rows:
        if row.task != task:
            task = row.task
            yield tables.row(f"**{task}**", *[""] * 5)
        step = "" if row.step is None else f"{row.step:.1f}"
        yield tables.row(row.name, found(row), row.engine and f"`{row.engine}`", step, told(row), kept_off(row))


def told(row: Row) -> str:
    return f"{row.verdict} (see below)" if row.verdict == REFUSED and row.expected else verdict(row)


def kept_off(row: Row) -> str:
    """Why another engine trains: what kept book-keeping out, or that it was slower."""
    if row.verdict != EXACT or row.engine == "bookkeeping":
        return ""
    reason = row.kept_out.get("bookkeeping", "")
    return short(reason, 110) if reason and not reason.startswith("not tried") else f"`{row.engine}` was faster"


def summary(rows: Sequence[Row]) -> str:
    """The numbers above the table."""
    counted = [r for r in rows if r.verdict != SKIPPED]
    verdicts, engines = Counter(r.verdict for r in counted), Counter(r.engine for r in counted if r.verdict == EXACT)
    text = f"{len(counted)} networks: " + ", ".join(f"{n} {v}" for v, n in verdicts.items()) + "."
    steps = {e: [r.step for r in counted if r.engine == e and r.step is not None] for e in engines}
    parts = [f"{n} on `{e}` (a step takes {statistics.median(steps[e]):.1f} times a non-private one)"
             for e, n in engines.most_common() if steps[e]]  # fmt: skip
    return f"{text} Engines: {', '.join(parts)}."


def by_sample(rows: Sequence[Row]) -> Iterator[str]:
    """The networks that are trained in batches of one or refused, and why."""
    for row in rows:
        if row.verdict == EXACT and row.engine == "microbatch":
            yield f"- {row.name}: " + "; ".join(f"`{n}` is not used: {reason}" for n, reason in row.kept_out.items())
        elif row.verdict not in (EXACT, SKIPPED):
            yield f"- {row.name}, {row.verdict}: {short(row.reason, 300)}"


def write(kind: str, rows: Sequence[Row]) -> None:
    """Put the results of a kind into ``benchmarks/results`` and those of all kinds into ``docs/families.md``."""
    keep(rows, f"families_{kind}", environment(PACKAGES))
    every, versions = [], environment(PACKAGES)
    for name in KINDS:
        path = ROOT / f"benchmarks/results/families_{name}.json"
        every += [_row(row) for row in json.loads(path.read_text())["rows"]] if path.exists() else []
    parts = {"summary": summary(every), "table": "\n".join(lines(every)), "by_sample": "\n".join(by_sample(every))}
    (ROOT / "docs/families.md").write_text(PAGE.format(**parts, **versions))


def _row(told: dict[str, Any]) -> Row:
    return Row(**{f.name: told[f.name] for f in fields(Row) if f.name in told and f.name != "opacus"})


PAGE = """\
# Public families of models

Measured by `make zoo` (`python -m benchmarks.zoo.families`) with torch {torch}, opacus {opacus}, transformers \
{transformers}, peft {peft}, timm {timm} and torchvision {torchvision}, on one CPU thread.

Architectures of transformers and PEFT with random weights and tiny settings, families of timm and torchvision on small images,
and models as diffusers, segmentation packages and graph packages have them, written in plain torch. Each is trained with the
loss it is made for. [The networks of MONAI](zoo.md) have a page of their own, which also compares with plain Opacus.

- **exact**: it trained with noise on Poisson draws, an empty draw and a single sample included, and the sum released without
  noise equals the sum of clipped gradients taken one sample at a time with ordinary autograd. The error is the largest of a
  parameter, relative to its norm, in float64 where the network takes it.
- **dpfix found**: [codes](rules/index.md) of the findings; in brackets those that need no repair. With a star, the repair
  changes the function that the model computes.
- **step**: time of a private step over that of a non-private one, on the same batches of eight samples on average. The
  networks are small, so this is mostly what a call of a layer costs, and other work beside it shows: single numbers are no
  measure of speed ([Speed and memory](speed.md) is). dpfix times the engines that are right and takes the fastest;
  `microbatch` is taken only where no other engine is right.

{summary}

{table}

## On `microbatch`, or refused

{by_sample}

SpecAugment, which Wav2Vec2, HuBERT and WavLM have switched on, draws its masks from NumPy's generator for the whole batch. Its
samples do not mix; that they do is what the comparison of a batch with single samples makes of these draws. With
`apply_spec_augment=False` all three train. Graphs train padded to one size, or with a list of edges for each.
"""

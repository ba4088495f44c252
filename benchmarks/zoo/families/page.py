"""The table of the public families, and the page that it stands in."""

from __future__ import annotations

import importlib
import json
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
    yield from tables.head("network", "dpfix found", "engine", "dpfix", "kept off `bookkeeping`")
    task = ""
    for row in rows:
        if row.task != task:
            task = row.task
            yield tables.row(f"**{task}**", *[""] * 4)
        yield tables.row(row.name, found(row), row.engine and f"`{row.engine}`", told(row), kept_off(row))


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
    return f"{text} Engines: {', '.join(f'{n} on `{e}`' for e, n in engines.most_common())}."


def by_sample(rows: Sequence[Row]) -> Iterator[str]:
    """The networks that are trained in batches of one or refused, and why."""
    for row in rows:
        if row.verdict == EXACT and row.engine == "microbatch":
            yield f"- {row.name}: " + "; ".join(f"`{n}` is not used: {reason}" for n, reason in row.kept_out.items())
        elif row.verdict not in (EXACT, SKIPPED):
            yield f"- {row.name}, {row.verdict}: {short(row.reason, 900)}"


def write(kind: str, rows: Sequence[Row]) -> None:
    """Put the results of a kind into ``benchmarks/results`` and those of all kinds into ``docs/families.md``.

    Args:
        rows: those that were measured; the others of the kind stay as they are.
    """
    measured = {row.name: row for row in rows}
    names = [network.name for network in importlib.import_module(f"benchmarks.zoo.families.{kind}").NETWORKS]
    known = {row.name: row for row in _kept(kind)} | measured
    keep([known[name] for name in names if name in known], f"families_{kind}", environment(PACKAGES))
    every, versions = [row for name in KINDS for row in _kept(name)], environment(PACKAGES)
    parts = {"summary": summary(every), "table": "\n".join(lines(every)), "by_sample": "\n".join(by_sample(every))}
    (ROOT / "docs/families.md").write_text(PAGE.format(**parts, **versions))


def _kept(kind: str) -> list[Row]:
    path = ROOT / f"benchmarks/results/families_{kind}.json"
    return [_row(row) for row in json.loads(path.read_text())["rows"]] if path.exists() else []


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
- **engine**: dpfix times the engines that are right and takes the fastest, so another machine may show another name;
  `microbatch` is taken only where no other engine is right. The networks are too small to say how fast a private step is;
  [Speed and memory](speed.md) does.

Engines are tried in single precision. Where one differs there from the batch-of-one reference, both are run again in double
precision, which decides up to twice the error that single precision makes in the reference itself. ShuffleNet is such a case:
its GroupNorms divide by nearly nothing, so that a sample's gradient in single precision is two thirds off on the plain model
and `bookkeeping` is 8 % off the reference; in double precision they agree to 1e-14.

torchvision's own operators (`nms`, `roi_align`) are not needed by any of these and may be absent.

{summary}

{table}

## On `microbatch`, or refused

{by_sample}

CLIP's contrastive loss compares every pair of samples, so there is no gradient of one sample alone to clip; a loss over pairs
that are samples themselves, or over classes (the row above it), trains. torch_geometric's way to make one graph of a batch trains
where all graphs have as many nodes; graphs of other sizes train padded with a mask, or with a list of edges for each.
"""

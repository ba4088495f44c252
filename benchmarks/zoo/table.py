"""The table of all networks, and the page that it stands in."""

from __future__ import annotations

import json
import platform
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import tables
from benchmarks.zoo.measure import EXACT, LARGEST_ERROR, MODES, SKIPPED, Row, short

ROOT = Path(__file__).parents[2]


def lines(rows: Sequence[Row]) -> Iterator[str]:
    """The table."""
    yield from tables.head(
        "network", "Opacus, `hooks`", "Opacus, `functorch`", "dpfix found", "engine", "step", "dpfix"
    )
    task = ""
    for row in rows:
        if row.task != task:
            task = row.task
            yield tables.row(f"**{task}**", *[""] * 6)
        cells = (opacus_cell(row, mode) for mode in MODES)
        step = "" if row.step is None else f"{row.step:.1f}"
        yield tables.row(row.name, *cells, found(row), row.engine and f"`{row.engine}`", step, verdict(row))


def opacus_cell(row: Row, mode: str) -> str:
    if mode not in row.opacus:
        return ""
    cell = row.opacus[mode]
    if cell.stops:
        return f"stops: `{short(cell.stops)}`"
    wrong = cell.error is not None and cell.error > LARGEST_ERROR[torch.float32]
    text = f"**silent** error {cell.error:.0e}" if wrong else "trains"
    return f"{text}; empty draw: `{short(cell.empty)}`" if cell.empty else text


def found(row: Row) -> str:
    """The codes, with a star where the repair computes another function and brackets where there was none."""

    def one(code: str, count: int) -> str:
        text = code + ("*" if code in row.changed else "") + (f" x{count}" if count > 1 else "")
        return text if code in row.repaired else f"({text})"

    return ", ".join(one(c, n) for c, n in sorted(row.found.items()))


def verdict(row: Row) -> str:
    if row.verdict == EXACT:
        return f"exact, error {row.error:.0e}"
    strong = "" if row.expected else "**"
    return f"{strong}{row.verdict}{strong}: {short(row.reason, 160)}"


def summary(rows: Sequence[Row]) -> str:
    """The numbers below the table."""
    counted = [r for r in rows if r.verdict != SKIPPED]
    trained = {m: [r for r in counted if m in r.opacus and not r.opacus[m].stops] for m in MODES}
    either = {r.name for found in trained.values() for r in found}
    verdicts, engines = Counter(r.verdict for r in counted), Counter(r.engine for r in counted if r.verdict == EXACT)
    steps = {e: [r.step for r in counted if r.engine == e and r.step is not None] for e in engines}
    text = [f"{len(counted)} configurations, {len(rows) - len(counted)} skipped."]
    for mode, those in trained.items():
        silent = sum((r.opacus[mode].error or 0) > LARGEST_ERROR[torch.float32] for r in those)
        empty = sum(bool(r.opacus[mode].empty) for r in those)
        text.append(f"Plain Opacus with `{mode}` trains {len(those)}; {silent} of these release a wrong sum without a word, "
                    f"and {empty} stop at an empty draw.")  # fmt: skip
    text.append(f"With one of both it trains {len(either)}.")
    text.append("dpfix: " + ", ".join(f"{n} {v}" for v, n in verdicts.items()) + ".")
    told = [f"{n} on `{e}` (a step takes {statistics.median(steps[e]):.1f} times a non-private one)"
            for e, n in engines.most_common()]  # fmt: skip
    return " ".join(text) + (f" Engines: {', '.join(told)}." if told else "")


def by_sample(rows: Sequence[Row]) -> Iterator[str]:
    """The networks that are trained in batches of one, and what kept dpfix's other engines out."""
    for row in rows:
        if row.verdict == EXACT and row.engine == "microbatch":
            yield f"- {row.name}: " + "; ".join(f"`{n}` is not used: {reason}" for n, reason in row.kept_out.items())


def variants() -> str:
    """Classes without a row of their own."""
    from benchmarks.zoo.networks import STANDS_FOR  # MONAI, which other tables do without

    return "; ".join(f"{', '.join(classes)} by {name}" for name, classes in STANDS_FOR.items())


def environment(packages: Sequence[str] = ("torch", "opacus", "monai", "dpfix")) -> dict[str, Any]:
    return {
        **{name: metadata.version(name).partition("+")[0] for name in packages},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": 1,
    }


def keep(rows: Sequence[Row], name: str, environment: dict[str, Any]) -> None:
    """Put the results into ``benchmarks/results``."""
    results = ROOT / f"benchmarks/results/{name}.json"
    results.parent.mkdir(exist_ok=True)
    told = ",\n".join(json.dumps(asdict(row)) for row in rows)
    results.write_text(f'{{"environment": {json.dumps(environment)},\n"rows": [\n{told}\n]}}\n')


def write(rows: Sequence[Row]) -> None:
    """Put the results into ``benchmarks/results/zoo.json`` and the table into ``docs/zoo.md``."""
    keep(rows, "zoo", environment())
    (ROOT / "docs/zoo.md").write_text(
        PAGE.format(
            table="\n".join(lines(rows)),
            summary=summary(rows),
            by_sample="\n".join(by_sample(rows)),
            variants=variants(),
            **environment(),
        )
    )


PAGE = """\
# The networks of MONAI

Written by `make zoo` (`python -m benchmarks.zoo --write`) with torch {torch}, opacus {opacus}, monai {monai}, on one CPU thread.

Every trainable network of `monai.networks.nets`, small, with the loss it is made for. Both libraries train it with noise on
Poisson draws; plain Opacus gets the model after `ModuleValidator.fix`.

- **exact**: it trained, an empty draw and a single sample included, and the sum released without noise equals the sum of
  clipped gradients taken one sample at a time with ordinary autograd. The error is the largest of a parameter, relative to
  its norm, in float64 where the network takes it.
- **silent**: plain Opacus raises nothing, and the sum it releases is another one.
- **empty draw**: Poisson sampling draws no sample now and then; the error with which plain Opacus ends there.
- **dpfix found**: [codes](rules/index.md) of the findings; in brackets those that need no repair. With a star, the repair
  changes the function that the model computes.
- **step**: time of a private step over that of a non-private one, on the same batches of eight samples on average, four
  for large networks. dpfix times the engines that are right and takes the fastest, so another machine may show another
  name; `microbatch` is taken only where no other engine is right.

{summary}

{table}

Classes that differ in the number of layers only, or are a base class, are represented: {variants}.

## On `microbatch`

Networks that are trained in batches of one, and what kept the other engines of dpfix out:

{by_sample}
"""

"""What must not go wrong in long use, measured; prints docs/reliability.md.

``python -m benchmarks.soak [--quick] [--only PART ...] [--write docs/reliability.md]``

The sizes are arguments; the full ones are the defaults (about an hour). The exit status is 1 if anything is not as it
has to be. Memory and open files are read from /proc, so that this needs Linux.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.common import tables
from benchmarks.common.process import quiet
from benchmarks.soak import calls, canary, files, noise, steps
from benchmarks.soak.part import Part

SIZES: dict[str, tuple[int, int, str]] = {
    "steps": (10_000, 200, "steps of each model"),
    "calls": (2000, 100, "calls with values at random"),
    "interrupts": (300, 12, "interrupts of the call"),
    "kills": (12, 3, "kills while saving"),
    "noise-steps": (400, 50, "steps whose noise is looked at, for each engine and clipping"),
    "trainings": (1000, 50, "trainings with the canary, and as many without it"),
    "opacus-trainings": (1000, 500, "the same with plain Opacus"),
}
"""Full size, quick size, and what it counts."""


TITLES = {
    "steps": "Long trainings",
    "calls": "Calls with values at random",
    "interrupts": "Interrupts of the call",
    "kills": "Kills while saving",
    "files": "Hostile files",
    "noise": "Noise",
    "canary": "A canary",
}
"""Heading of each part, in the order of the page."""


def parts(sizes: dict[str, int], seed: int) -> dict[str, Callable[[], Part]]:
    """What measures each part."""
    return {
        "steps": functools.partial(steps.measure, sizes["steps"]),
        "calls": functools.partial(calls.at_random, sizes["calls"], seed),
        "interrupts": functools.partial(calls.with_interrupts, sizes["interrupts"], seed),
        "kills": functools.partial(files.kills, sizes["kills"]),
        "files": files.hostile,
        "noise": functools.partial(noise.measure, sizes["noise-steps"]),
        "canary": functools.partial(canary.measure, sizes["trainings"], sizes["opacus-trainings"]),
    }


def write(page: Path, sections: dict[str, list[str]]) -> None:
    """Put sections into the page; those of parts that were not measured stay."""
    kept: dict[str, list[str]] = {}
    for section in tables.written(page).split("## ")[1:]:
        title, *lines = section.rstrip().splitlines()
        kept[title] = [*lines, ""]
    sections = kept | sections
    lines = [line for title in TITLES.values() if title in sections for line in (f"## {title}", *sections[title])]
    tables.write(page, lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, where no size is given")
    for name, (full, small, counts) in SIZES.items():
        parser.add_argument(f"--{name}", type=int, help=f"{counts} ({full}; quick: {small})")
    parser.add_argument("--only", nargs="+", choices=TITLES, default=list(TITLES), help="only these parts")
    parser.add_argument("--seed", type=int, default=2, help="of the values and places at random")
    parser.add_argument("--write", type=Path, help="page whose figures are replaced")
    given = vars(parser.parse_args())
    sizes = {name: given[name.replace("-", "_")] for name in SIZES}
    sizes = {name: SIZES[name][given["quick"]] if size is None else size for name, size in sizes.items()}
    quiet()
    sections, wrong = dict[str, list[str]](), list[str]()
    for name in given["only"]:
        begun = time.perf_counter()
        part = parts(sizes, given["seed"])[name]()
        print(f"{name}: {time.perf_counter() - begun:.0f} s", file=sys.stderr)
        told = [*(f"- **wrong**: {fact}" for fact in part.wrong), ""] if part.wrong else []
        sections[TITLES[name]] = ["", *part.lines, "", *told]
        print("\n".join([f"## {TITLES[name]}", *sections[TITLES[name]]]), flush=True)
        wrong += part.wrong
    if given["write"]:
        write(given["write"], sections)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

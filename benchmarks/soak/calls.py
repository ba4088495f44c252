"""Calls with values at random, and calls that are interrupted at random lines."""

from __future__ import annotations

import itertools

from benchmarks.common import tables
from benchmarks.soak.part import Part
from tests.scan.test_values import fuzzed
from tests.test_interrupts import MODELS, interrupted


def at_random(calls: int, seed: int) -> Part:
    """The generator is that of tests/scan/test_values.py."""
    found = fuzzed(calls, seed)
    refused = calls - found.successes - len(found.raw)
    lines = [
        *tables.head("calls", "succeeded", "refused by a DPFixError", "any other error", "refused, and left a trace"),
        tables.row(f"{calls:,}", found.successes, f"{refused:,}", len(found.raw), len(found.traces)),
    ]
    return Part(lines, found.raw + found.traces)


def with_interrupts(interrupts: int, seed: int) -> Part:
    """The mechanism is that of tests/test_interrupts.py."""
    kinds = list(itertools.product(MODELS, (KeyboardInterrupt, MemoryError)))
    lines, wrong, total = tables.head("model", "interrupt", "interrupts of the call", "models left changed"), [], 0
    for number, (name, error) in enumerate(kinds):
        wanted, came, left = (interrupts - total) // (len(kinds) - number), 0, {}
        for attempt in range(5):  # a call may end before the line at which it was to be interrupted
            if came < wanted:
                more, found, _ = interrupted(name, "bookkeeping", wanted - came, error, seed + attempt, last=0)
                came, left = came + more, left | found
        total += came
        lines.append(tables.row(name, error.__name__, came, len(left)))
        wrong += [f"{name}, {error.__name__} at {place}: {', '.join(what)} changed" for place, what in left.items()]
    lines.append(tables.row("all", "", total, len(wrong)))
    return Part(lines, wrong)

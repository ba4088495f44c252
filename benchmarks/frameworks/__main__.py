"""A table of small scripts on frameworks: lines changed, time of a step, epsilon.

    python -m benchmarks.frameworks [NAME ...] [--write docs/frameworks.md]

The scripts stand in ``benchmarks/frameworks/scripts``. A comment that begins with ``# dpfix:`` or ``# opacus:`` is a line that
the respective variant has and the plain script has not; a variant without any is not measured. Every variant runs in a process
of its own, with one thread.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from benchmarks.common import tables

FOLDER = Path(__file__).parent / "scripts"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py"))
VARIANTS = ("plain", "opacus", "dpfix")
FIRST = 6
"""Steps that are left out: there is where things are compiled, timed and checked."""
DELTA = 1e-4
LIMIT = 300.0
"""Seconds that a variant may take."""


def variant(text: str, name: str) -> str:
    """The script as somebody would have it who uses nothing, Opacus or dpfix."""
    text = re.sub(rf"^( *)# {name}: ", r"\1", text, flags=re.MULTILINE)
    return "".join(line for line in text.splitlines(keepends=True) if not re.match(r" *# (dpfix|opacus): ", line))


def changed(text: str, name: str) -> int:
    """Lines that a variant has and the plain script has not, or the other way round."""
    both = difflib.ndiff(variant(text, "plain").splitlines(), variant(text, name).splitlines())
    return sum(line.startswith(("+ ", "- ")) for line in both)


def run(script: str, name: str) -> dict[str, Any]:
    """Run one variant in this process.

    Returns:
        The median CPU time from step to step, and epsilon of a private variant by dpfix.
    """
    import torch
    from torch.optim import optimizer

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    at: list[float] = []

    def stepped(stepping: Any, *_: Any) -> None:
        if not hasattr(stepping, "original_optimizer"):  # Opacus's wrapper steps on the one inside
            at.append(time.process_time())

    optimizer.register_optimizer_step_post_hook(stepped)
    space: dict[str, Any] = {"__name__": "__main__"}
    file = FOLDER / f"{script}.py"
    exec(compile(variant(file.read_text(), name), str(file), "exec"), space)
    steps = [b - a for a, b in itertools.pairwise(at)][FIRST:]
    found: dict[str, Any] = {"seconds": statistics.median(steps), "steps": len(at)}
    if "private" in space:
        found |= {"epsilon": space["private"].get_epsilon(DELTA), "engine": space["private"].plan.engine}
    return found


def measure(script: str, name: str) -> dict[str, Any]:
    """Run one variant in a process of its own; its failure is a result."""
    command = [sys.executable, "-m", "benchmarks.frameworks", "--one", script, name]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, env=environment, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"no end after {LIMIT:.0f} s"}
    if done.returncode:
        return {"failed": tables.short((done.stderr.strip().splitlines() or ["?"])[-1], 90)}
    return json.loads(done.stdout.strip().splitlines()[-1])


def needed(script: str) -> list[str]:
    """Packages that a script imports and that are missing here."""
    names = re.findall(r"^(?:from|import) (\w+)", (FOLDER / f"{script}.py").read_text(), flags=re.MULTILINE)
    return [name for name in dict.fromkeys(names) if importlib.util.find_spec(name) is None]


def line(script: str) -> str:
    """A line of the table."""
    text = (FOLDER / f"{script}.py").read_text()
    found = {name: measure(script, name) for name in VARIANTS if name == "plain" or f"# {name}: " in text}
    plain = found["plain"].get("seconds")

    def cell(name: str) -> str:
        if name not in found:
            return "-"
        if "failed" in found[name]:
            return "stops: " + found[name]["failed"]
        seconds = found[name]["seconds"]
        return f"{1e3 * seconds:.1f} ms" + (f" ({seconds / plain:.1f})" if plain and name != "plain" else "")

    epsilon = found["dpfix"].get("epsilon")
    return tables.row(
        f"`{script}`",
        len(variant(text, "plain").splitlines()),
        changed(text, "dpfix"),
        *map(cell, VARIANTS),
        found["dpfix"].get("engine", "-"),
        "-" if epsilon is None else f"{epsilon:.2f}",
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="scripts; all if none is given")
    parser.add_argument("--write", type=Path, help="page whose table is replaced")
    parser.add_argument("--one", nargs=2, metavar=("SCRIPT", "VARIANT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(run(*arguments.one)))
        return 0
    lines = tables.head(
        "script", "lines", "changed", "step, plain", "Opacus (times plain)", "dpfix (times plain)", "engine", "epsilon"
    )
    print("\n".join(lines))
    missing = []
    for script in arguments.names or SCRIPTS:
        if packages := needed(script):
            missing.append(f"{script} ({', '.join(packages)})")
            continue
        lines.append(line(script))
        print(lines[-1], flush=True)
    if missing:
        print("left out, packages are missing: " + ", ".join(missing))
    if arguments.write is not None:
        if missing:
            raise SystemExit(f"{arguments.write} stays as it is: not all scripts could be run")
        tables.write(arguments.write, lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Private trainings in processes of their own that share the file of a budget; run as a module by the tests.

``kills PATH STEPS...``: trainings one after another, each killed after so many steps, and a part of one. ``killed_at PATH
MOMENT``: one that kills itself while it writes. ``together PATH NUMBER``: so many at the same time.
``alone PATH STEPS``: one of so many steps at most. Every training tells of a release before a parameter moves.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import dpfix
from tests.helpers import setting, train


class Telling(torch.optim.SGD):
    """Tells of every step before it moves a parameter."""

    to: int = -1

    def step(self, closure: Any = None) -> Any:
        os.write(self.to, b"x")
        return super().step(closure)


def training(path: str, to: int) -> dpfix.PrivateTraining:
    from tests.cases import mlp

    model = mlp()
    optimizer = Telling(model.parameters(), lr=0.1)
    optimizer.to = to
    given = setting(model, optimizer=optimizer, noise_multiplier=4.0, budget=dpfix.Budget(path))
    return dpfix.make_private_safe(**given)


def child(act: Callable[[int], None]) -> tuple[int, int]:
    """Start a process that acts; returns its number and the end of the pipe that it tells of its steps."""
    end, to = os.pipe()
    if pid := os.fork():
        os.close(to)
        return pid, end
    try:
        os.close(end)
        act(to)
        atexit._run_exitfuncs()  # as a process that ends by itself
    finally:
        os._exit(0)


def told(pid: int, end: int) -> int:
    """How many steps a process has told of, when it is over."""
    os.waitpid(pid, 0)
    with os.fdopen(end, "rb") as pipe:
        return len(pipe.read())


def kills(path: str, moments: list[float]) -> list[int]:
    counts = []
    for moment in moments:
        pid, end = child(lambda to: train(training(path, to), 10**6) and None)
        seen = sum(len(os.read(end, 1)) for _ in range(int(moment)))
        time.sleep(0.02 * (moment % 1))
        os.kill(pid, signal.SIGKILL)
        counts.append(seen + told(pid, end))
        dpfix.Budget(path)  # can be read
    return counts


def killed_at(path: str, moment: str) -> list[int]:
    """One training that is killed in the middle of its third writing: before or after the file takes the place of the old one."""
    replace = Path.replace

    def act(to: int) -> None:
        begun, writes = training(path, to), 0

        def dying(self: Path, target: Any) -> Any:
            nonlocal writes
            writes += 1
            if writes == 3 and moment == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            replace(self, target)
            if writes == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return self

        Path.replace = dying  # type: ignore[method-assign]
        train(begun, 10**6)

    return [told(*child(act))]


def until_refused(path: str, to: int, ready: Callable[[], None] = lambda: None, most: int = 10**6) -> None:
    begun = training(path, to)
    ready()
    try:
        train(begun, most)
    except dpfix.BudgetError as error:
        print(error, file=sys.stderr)


def together(path: str, processes: int) -> list[int]:
    """Several trainings, which begin when all are ready and go on until they are refused."""

    def all_ready() -> None:
        Path(f"{path}.ready.{os.getpid()}").touch()
        while len(list(Path(path).parent.glob("*.ready.*"))) < processes:
            time.sleep(0.01)

    children = [child(lambda to: until_refused(path, to, all_ready)) for _ in range(processes)]
    return [told(*one) for one in children]


def alone(path: str, most: int) -> list[int]:
    """One of so many steps at most, in this process, which ends by itself."""
    end, to = os.pipe()
    until_refused(path, to, most=most)
    os.close(to)
    with os.fdopen(end, "rb") as pipe:
        return [len(pipe.read())]


if __name__ == "__main__":
    what, file, *rest = sys.argv[1:]
    torch.manual_seed(0)
    if what == "kills":
        print(json.dumps(kills(file, [float(r) for r in rest])))
    elif what == "killed_at":
        print(json.dumps(killed_at(file, *rest)))
    elif what == "alone":
        print(json.dumps(alone(file, int(*rest))))
    else:
        print(json.dumps(together(file, int(*rest))))

"""Private trainings in processes of their own that share the file of a budget; run as a module by the tests.

``kills PATH STEPS...``: trainings one after another, each killed after so many steps, and a part of one. ``killed_at PATH
MOMENT``: one that kills itself while it writes. ``together PATH NUMBER``: so many at the same time.
``alone PATH STEPS``: one of so many steps at most. ``stopped PATH WHAT``: one that stops itself while it writes, and another
one after something was done to the files. ``gone_at_end PATH``: one whose file is gone when its process ends, with status 3.
Every training tells of a release before a parameter moves.
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
from dpfix.training import budget_file
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


def stopped(path: str, what: str) -> list[int]:
    """One training that is stopped in its third writing, and another after something was done to the files."""
    replace, as_text = Path.replace, budget_file._text
    end, to = os.pipe()
    if not (pid := os.fork()):
        os.close(end)
        begun, writes = training(path, to), 0

        def stop_at_third() -> None:
            nonlocal writes
            writes += 1
            if writes == 3:
                os.kill(os.getpid(), signal.SIGSTOP)

        def stopping(self: Path, target: Any) -> Any:
            stop_at_third()
            return replace(self, target)

        def early(content: Any) -> Any:
            stop_at_third()
            return as_text(content)

        if (
            what.startswith("moved") and what != "moved late"
        ):  # before the new content is written; otherwise when it is about to take its place
            budget_file._text = early  # type: ignore[assignment]
        else:
            Path.replace = stopping  # type: ignore[method-assign]
        try:
            train(begun, 3 * 16)
        except dpfix.BudgetError as error:
            print(error, file=sys.stderr)
        try:
            train(begun, 1)  # and every further step is refused
        except dpfix.BudgetError as error:
            print(error, file=sys.stderr)
        atexit._run_exitfuncs()
        os._exit(0)
    os.close(to)
    os.waitpid(pid, os.WUNTRACED)
    moved = str(Path(path).with_name("moved.json"))
    if what == "lock removed":
        Path(f"{path}.lock").unlink()
    else:
        Path(path).rename(moved)
    if what == "moved and linked":
        Path(path).symlink_to(moved)
    budget_file.PATIENCE = 0.5
    there = path if Path(path).exists() else moved
    other = child(lambda to: until_refused(there, to, most=5))
    second = told(*other)
    os.kill(pid, signal.SIGCONT)
    return [told(pid, end), second]


def gone_at_end(path: str) -> None:
    """A training that has something reserved when the file goes and the process ends."""
    train(training(path, os.open(os.devnull, os.O_WRONLY)), 2)
    Path(path).unlink()
    sys.exit(3)


if __name__ == "__main__":
    what, file, *rest = sys.argv[1:]
    torch.manual_seed(0)
    if what == "kills":
        print(json.dumps(kills(file, [float(r) for r in rest])))
    elif what == "killed_at":
        print(json.dumps(killed_at(file, *rest)))
    elif what == "stopped":
        print(json.dumps(stopped(file, *rest)))
    elif what == "gone_at_end":
        gone_at_end(file)
    elif what == "alone":
        print(json.dumps(alone(file, int(*rest))))
    else:
        print(json.dumps(together(file, int(*rest))))

"""What a command that takes its time is doing: a bar where stderr is a terminal and rich is installed, a line without rich."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeAlias

Say: TypeAlias = Callable[[str, float | None], None]
"""Told what is being done, and which part of everything is done: from 0 to 1, or ``None`` if that is not known."""


@contextmanager
def progress(what: str) -> Iterator[Say]:
    """Show what is being done until the block ends; nothing of it stays, and it goes to stderr alone.

    Args:
        what: what is being done first.

    Yields:
        What is told of everything that follows.
    """
    if not sys.stderr.isatty():
        yield lambda text, done: None
        return
    with _bar() if find_spec("rich") is not None else _line() as say:
        say(what, None)
        yield say


@contextmanager
def _bar() -> Iterator[Say]:
    rich: Any = import_module("rich.progress")
    console: Any = import_module("rich.console").Console(stderr=True)
    text = rich.TextColumn("{task.description}", markup=False)
    columns = (rich.SpinnerColumn(), text, rich.BarColumn(), rich.TimeElapsedColumn())
    alone = {"transient": True, "redirect_stdout": False, "redirect_stderr": False}
    with rich.Progress(*columns, console=console, **alone) as bar:
        task = bar.add_task("", total=None)

        def say(text: str, done: float | None) -> None:
            if done is not None:
                bar.update(task, total=1.0, completed=done)
            bar.update(task, description=text)

        yield say


@contextmanager
def _line() -> Iterator[Say]:
    def say(text: str, done: float | None) -> None:
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)

    try:
        yield say
    finally:
        say("", None)

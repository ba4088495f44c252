"""The locks of a budget: one thread of this process, one process of all.

They are let go also where an interrupt keeps the end of a ``with`` from running: a generator that nobody has any more is closed.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # there are systems without it
    fcntl = None

ONE = threading.RLock()
"""Held by the thread of this process that changes a budget, or what one of its trainings has reserved; nothing else is waited for
with it but the file."""
os.register_at_fork(after_in_child=ONE._at_fork_reinit)  # type: ignore[attr-defined]  # its holder is not in the child


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """No other thread of this process changes a budget meanwhile."""
    with ONE:
        yield


@contextmanager
def both_locked(
    queue: Path, file: Path, lock: Callable[[BinaryIO], None]
) -> Iterator[tuple[BinaryIO, BinaryIO | None]]:
    """The queue of a budget's writers and the budget itself, locked.

    Args:
        queue: made if there is none.
        file: may be missing.
        lock: waits for the lock of an open file.

    Yields:
        The open files; ``None`` for a budget that is missing.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    with ONE, ExitStack() as held:
        files: list[BinaryIO | None] = []
        for path, mode in ((queue, "ab"), (file, "r+b")):  # to be written to: some file systems lock nothing else
            try:
                opened: BinaryIO = held.enter_context(path.open(mode))  # type: ignore[assignment]
            except FileNotFoundError:
                if path is queue:
                    raise
                files.append(None)
            else:
                lock(opened)
                held.callback(fcntl.flock, opened, fcntl.LOCK_UN)  # type: ignore[union-attr]  # a fork may hold it open too
                files.append(opened)
        first, second = files
        assert first is not None
        yield first, second

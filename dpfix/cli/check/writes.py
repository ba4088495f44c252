"""In the process of a checked script: nothing is written outside of the copy."""

from __future__ import annotations

import functools
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

_EVENTS = {
    "os.mkdir": (0,), "os.rmdir": (0,), "os.remove": (0,), "os.rename": (0, 1), "os.link": (1,), "os.symlink": (1,),
    "os.truncate": (0,), "sqlite3.connect": (0,),
}  # fmt: skip
"""Where the paths stand in the arguments of what changes files."""

_CACHES = ("XDG_CACHE_HOME", "HF_HOME", "TORCH_HOME", "MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


class WrittenOutsideError(PermissionError):
    """The script writes to a place outside of its copied folder."""


def guard_writes(allowed: Iterable[str]) -> None:
    """From now on, opening a file for writing outside of some folders fails, as does making, moving and removing one.

    What other programs and libraries in C write by absolute paths is not seen; ``torch.save`` is.

    Args:
        allowed: the folders. The caches of the user and the folder for temporary files are allowed too.
    """
    home = Path.home()
    folders = [*allowed, tempfile.gettempdir(), "/dev", "/proc", str(home / ".cache"), str(home / ".triton")]
    folders += [os.environ[name] for name in _CACHES if os.environ.get(name)]
    inside = tuple(os.path.realpath(folder) for folder in folders)

    def check(path: Any) -> None:
        if isinstance(path, (str, bytes, os.PathLike)):
            name = os.fsdecode(path)
            real = os.path.realpath(name)
            if name != ":memory:" and not any(real == f or real.startswith(f + os.sep) for f in inside):
                raise WrittenOutsideError(
                    f"dpfix check: the script writes to {real}, which is outside of the copied folder. Give it a relative path, "
                    "or allow the place with --writable."
                )

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = args
            if (isinstance(flags, int) and flags & _WRITES) or (isinstance(mode, str) and set(mode) & set("wax+")):
                check(path)
        elif event in _EVENTS:
            for index in _EVENTS[event]:
                check(args[index])

    sys.addaudithook(hook)
    save = torch.save

    @functools.wraps(save)
    def checked_save(obj: Any, f: Any, *args: Any, **kwargs: Any) -> Any:
        check(f)
        return save(obj, f, *args, **kwargs)

    torch.save = torch.serialization.save = checked_save

"""A copy of a script's folder, in which it may write what it likes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from dpfix.errors import ArgumentError

NOT_COPIED = frozenset({".git", ".hg", ".venv", "venv", "node_modules", "__pycache__", ".tox", ".nox", ".mypy_cache"})
"""Folders that no script's run depends on."""

OFFLINE = {"WANDB_MODE": "offline", "NEPTUNE_MODE": "offline", "COMET_MODE": "disabled", "MPLBACKEND": "Agg"}
"""Loggers write into the copy and nowhere else."""


@dataclass(frozen=True)
class Workplace:
    """What has to be copied for a script.

    Attributes:
        script: the script.
        cwd: the folder that the command was given in.
        read_only: folders and files that are linked, since the script only reads them.
        most_bytes: of all files that are copied.
    """

    script: Path
    cwd: Path
    read_only: tuple[Path, ...]
    most_bytes: int

    @property
    def roots(self) -> tuple[Path, ...]:
        """The folders that are copied: the working folder, and the script's where it is not in there."""
        folder = self.script.parent
        if folder.is_relative_to(self.cwd):
            return (self.cwd,)
        return (folder,) if self.cwd.is_relative_to(folder) else (self.cwd, folder)

    def files(self) -> Iterator[Path]:
        """What is copied, folder by folder."""
        for root in self.roots:
            for above, folders, files in os.walk(root):
                here = Path(above)
                folders[:] = [f for f in folders if f not in NOT_COPIED and here / f not in self.read_only]
                yield from (here / f for f in files if here / f not in self.read_only)

    def check_size(self) -> None:
        """Refuse a folder that is too large to be copied.

        Raises:
            ArgumentError: it is; the message names its largest part.
        """
        total, parts = 0, dict[Path, int]()
        for file in self.files():
            if file.is_symlink() or not file.is_file():
                continue
            size = file.stat().st_size
            total += size
            root = next(root for root in self.roots if file.is_relative_to(root))
            part = root / file.relative_to(root).parts[0]
            parts[part] = parts.get(part, 0) + size
            if total > self.most_bytes:
                largest = max(parts, key=lambda p: parts[p])
                raise ArgumentError(
                    f"the folder of the script has more than {self.most_bytes >> 20} MB; so far {largest} is the largest part.",
                    "The script runs in a copy of its folder, so that nothing is written to its outputs.",
                    f"Name what it only reads: --read-only {largest}; or pass a larger --copy-limit.",
                    path="--copy-limit",
                )

    def copy_to(self, target: Path) -> Copied:
        """Copy everything.

        Args:
            target: an empty folder.

        Returns:
            Where things are in the copy.
        """
        places = {root: target / f"{number}" / root.name for number, root in enumerate(self.roots)}
        for root, place in places.items():
            shutil.copytree(root, place, symlinks=True, ignore=self._ignored)
        for path in self.read_only:
            root = next((root for root in places if path.is_relative_to(root)), None)
            if root is not None:
                link = places[root] / path.relative_to(root)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(path)
        return Copied(self, places)

    def _ignored(self, folder: str, names: list[str]) -> set[str]:
        here = Path(folder)
        return {n for n in names if n in NOT_COPIED or here / n in self.read_only or _is_special(here / n)}


def _is_special(path: Path) -> bool:
    return not (path.is_symlink() or path.is_file() or path.is_dir())


@dataclass(frozen=True)
class Copied:
    """A copy of a workplace.

    Attributes:
        of: what was copied.
        places: where each folder's copy is.
    """

    of: Workplace
    places: Mapping[Path, Path]

    def place(self, path: Path) -> Path:
        """Where a file of the workplace is in the copy."""
        root = next(root for root in self.places if path.is_relative_to(root))
        return self.places[root] / path.relative_to(root)

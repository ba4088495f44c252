"""Versions of what a report depends on."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata


def versions() -> Mapping[str, str]:
    """Versions of the packages that a report depends on, by name; one that runs from a folder has none."""
    found = {}
    for name in ("dpfix", "torch", "opacus"):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found | {"python": platform.python_version()}

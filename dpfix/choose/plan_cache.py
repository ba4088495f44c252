"""Remembering which engine was fastest for a model, so that the next run of the script need not time all of them.

What is remembered is the name of an engine and times, under a hash of the model's structure, shapes, versions and device;
no data values. A remembered engine is audited like any other: the cache saves the timing, never the proof.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import opacus
import torch
from torch import nn

from dpfix.instrument import pytree

logger = logging.getLogger("dpfix")

FORMAT = 1


MOST_BYTES = 65_536
"""Of a file; what is longer is none of ours."""


def folder() -> Path | None:
    """Where plans are remembered.

    Returns:
        ``$DPFIX_CACHE_DIR``, else ``dpfix`` in the user's cache directory; ``None`` for a user without a home.
    """
    try:
        own = os.environ.get("DPFIX_CACHE_DIR")
        if own:
            return Path(own).expanduser()
        desktop = Path(os.environ.get("XDG_CACHE_HOME") or "")
        if desktop.is_absolute():  # the specification says to ignore another one
            return desktop / "dpfix"
        home = Path.home()
        return home / ".cache" / "dpfix" if home.is_absolute() and home.is_dir() else None
    except (RuntimeError, OSError):  # no home is known, or it cannot be looked at
        return None


def key(module: nn.Module, batch: Any, **settings: Any) -> str:
    """What the choice of an engine depends on, as a hash.

    Args:
        batch: the batch that engines are timed on; only its shapes and dtypes count.
        **settings: what else matters (candidates, batch size, version).

    Returns:
        A hexadecimal digest.
    """
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    parts = {
        "format": FORMAT,
        "modules": [(n, type(m).__module__, type(m).__qualname__, m.extra_repr()) for n, m in module.named_modules()],
        "parameters": [
            (n, tuple(p.shape), str(p.dtype), str(p.device), p.requires_grad)
            for n, p in module.named_parameters(remove_duplicate=False)
        ],
        "batch": [(str(path), tuple(t.shape), str(t.dtype)) for path, t in pytree.leaves(batch) if torch.is_tensor(t)],
        "versions": (torch.__version__, opacus.__version__, platform.python_version()),
        "machine": (platform.machine(), platform.processor(), cuda, torch.get_num_threads()),
        "settings": sorted((name, str(value)) for name, value in settings.items()),
    }
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()


def remembered(name: str) -> dict[str, float] | None:
    """What was remembered under a key.

    Returns:
        Seconds by engine, best first; ``None`` if there is nothing that can be read.
    """
    place = folder()
    if place is None:
        return None
    try:
        file = place / f"{name}.json"
        if not file.is_file() or file.stat().st_size > MOST_BYTES:  # a pipe would be waited for
            return None
        found = json.loads(file.read_text())["seconds"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    legal = isinstance(found, dict) and all(key and _is_time(value) for key, value in found.items())
    return found if legal and found else None


def _is_time(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


def remember(name: str, seconds: Mapping[str, float]) -> None:
    """Remember the order of the engines; a folder that cannot be written to is no reason to stop.

    Args:
        seconds: seconds by engine, best first.
    """
    place = folder()
    if place is None:
        return
    try:
        place.mkdir(parents=True, exist_ok=True)
        # A file appears complete or not at all: several processes may start with the same model.
        with tempfile.NamedTemporaryFile("w", dir=place, suffix=".part", delete=False) as file:
            json.dump({"seconds": dict(seconds)}, file)
        try:
            os.replace(file.name, place / f"{name}.json")
        finally:
            Path(file.name).unlink(missing_ok=True)
    except OSError as error:
        logger.info("the plan was not remembered in %s: %s", place, error)

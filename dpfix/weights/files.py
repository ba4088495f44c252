"""Reading and writing checkpoints: safetensors if it is installed, torch's format otherwise, never arbitrary code."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpfix.errors import ArgumentError, CheckpointError

ENTRIES = ("state_dict", "model_state_dict", "module_state_dict", "model", "net", "network", "network_weights")
"""Names under which training scripts keep the weights among other things."""

Source = str | os.PathLike[str] | Mapping[str, Any]


def read(path: str | os.PathLike[str]) -> Any:
    """What a file holds, without running code from it.

    Args:
        path: a ``.safetensors`` file, or one that ``torch.save`` wrote.

    Returns:
        The content, on the CPU.

    Raises:
        ArgumentError: there is no such file, or safetensors is not installed.
        CheckpointError: the file holds more than tensors and plain values.
    """
    file = Path(path)
    if not file.is_file():
        raise ArgumentError(f"checkpoint={str(path)!r} is not a file.", path="checkpoint")
    if file.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise ArgumentError(
                f"checkpoint={str(path)!r} needs the package safetensors: pip install safetensors.", path="checkpoint"
            ) from error
        return load_file(file)
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"checkpoint={str(path)!r} holds more than tensors and plain values, and reading it would run code from the file.",
            help="If you trust it, read it yourself with torch.load(path, weights_only=False) and pass the state dict.",
            path="checkpoint",
        ) from error


def write(state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> Path:
    """Save a state dict: as safetensors if the name ends so, with ``torch.save`` otherwise.

    Returns:
        The file.

    Raises:
        ArgumentError: safetensors is not installed.
    """
    file = Path(path)
    if file.suffix != ".safetensors":
        torch.save(dict(state), file)
        return file
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ArgumentError(
            f"path={str(path)!r} needs the package safetensors: pip install safetensors.", path="path"
        ) from error
    # The format holds every tensor once and contiguous; tied weights are written under each of their keys.
    save_file({key: value.detach().clone(memory_format=torch.contiguous_format) for key, value in state.items()}, file)
    return file


def tensors(checkpoint: Source, entry: str | None) -> dict[str, Tensor]:
    """The state dict in a checkpoint.

    Args:
        checkpoint: a file, or a mapping.
        entry: the key that holds the state dict; looked for if not given.

    Returns:
        Tensors by key, in a new dict.

    Raises:
        ArgumentError: there is no state dict, or ``entry`` does not lead to one.
    """
    content = checkpoint if isinstance(checkpoint, Mapping) else read(checkpoint)
    if entry is not None:
        if not isinstance(content, Mapping) or not _is_state(content.get(entry)):
            raise ArgumentError(
                f"entry={entry!r}: the checkpoint has no state dict there. It has {_shown(content)}.", path="entry"
            )
        return dict(content[entry])
    if _is_state(content):
        return dict(content)
    held = [name for name in ENTRIES if isinstance(content, Mapping) and _is_state(content.get(name))]
    if len(held) != 1:
        what = (
            f"several state dicts: {', '.join(held)}"
            if held
            else f"no state dict that dpfix recognises: {_shown(content)}"
        )
        raise ArgumentError(f"checkpoint holds {what}.", help="Name the one to load with entry=...", path="checkpoint")
    return dict(content[held[0]])


def _is_state(content: Any) -> bool:
    return isinstance(content, Mapping) and bool(content) and all(isinstance(v, Tensor) for v in content.values())


def _shown(content: Any) -> str:
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    return ", ".join(map(str, list(content)[:8])) or "nothing"

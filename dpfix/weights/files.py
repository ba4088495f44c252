"""Reading and writing checkpoints: safetensors if it is installed, torch's format otherwise, never arbitrary code."""

from __future__ import annotations

import os
import pickle
import secrets
import stat
import struct
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from dpfix.errors import ArgumentError, CheckpointError, MissingFileError
from dpfix.report.finding import Finding

ENTRIES = ("state_dict", "model_state_dict", "module_state_dict", "model", "net", "network", "network_weights")
"""Names under which training scripts keep the weights among other things."""

Source = str | os.PathLike[str] | Mapping[str, Any]

FAILURES = (
    OSError,
    EOFError,
    MemoryError,
    ArithmeticError,
    ImportError,
    LookupError,
    AttributeError,
    TypeError,
    ValueError,
    AssertionError,
    RuntimeError,
    pickle.PickleError,
    struct.error,
    tarfile.TarError,
)
"""What ``torch.load`` raises for a file that is damaged or none of its own, and ``torch.save`` for what cannot be saved."""


@contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file that appears complete or not at all: whatever stops the writing, an earlier file of that name stays.

    It is written beside the earlier one, under a name that ends in ``.part``; only a killed process leaves that behind.
    Links and permissions stay; a device or a pipe takes what is written.

    Args:
        path: file name.

    Yields:
        The file to write into.

    Raises:
        PermissionError: the earlier file is write-protected.
    """
    target = Path(os.path.realpath(path))
    earlier = target.stat() if target.exists() else None
    if earlier is not None and not stat.S_ISREG(earlier.st_mode):
        with target.open("wb") as file:
            yield file
        return
    if earlier is not None and not os.access(target, os.W_OK):
        raise PermissionError(f"{target} is write-protected")
    part = target.with_name(f".{target.name[:40]}.{secrets.token_hex(4)}.part")
    try:
        with part.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if earlier is not None:
            part.chmod(stat.S_IMODE(earlier.st_mode))
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    with suppress(OSError):  # not every system can say when a folder is on the disk
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def load(file: Any, options: Mapping[str, Any], *, name: str, trusted: str) -> Any:
    """``torch.load`` in which every failure is an error of dpfix.

    Args:
        file: file name or binary file.
        options: arguments of ``torch.load``.
        name: the argument that the file was given in.
        trusted: what to do with a file that holds more than tensors and plain values and is trusted.

    Returns:
        What the file holds.

    Raises:
        MissingFileError: there is no such file.
        CheckpointError: it cannot be read, or holds more than tensors and plain values.
    """
    try:
        return torch.load(file, **{"weights_only": True, **options})
    except FileNotFoundError as error:
        raise MissingFileError(f"{name}={str(file)!r}: there is no file of that name.", path=name) from error
    except pickle.UnpicklingError as error:
        if "GLOBAL" not in str(error) and "Unsupported" not in str(error):
            raise CheckpointError(_damaged(file, name, error)) from error
        raise CheckpointError(
            f"{name}={str(file)!r} holds more than tensors and plain values, and reading it would run code from the file.",
            help=trusted,
            path=name,
        ) from error
    except (UserWarning, *FAILURES) as error:  # torch warns about a pickle that is none of its own
        raise CheckpointError(_damaged(file, name, error)) from error


def _damaged(file: Any, name: str, error: BaseException) -> Finding:
    cause = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else 'no reason given'}"
    return Finding.refusal(
        "DPF039",
        f"{name}={str(file)!r} cannot be read ({cause}).",
        "it is no file of torch.save, or it was damaged, or cut short when its writing was stopped.",
        "take an earlier file. One that was saved on a GPU needs map_location='cpu' among the arguments of torch.load.",
        path=name,
    )


def read(path: str | os.PathLike[str]) -> Any:
    """What a file holds, without running code from it.

    Args:
        path: a ``.safetensors`` file, or one that ``torch.save`` wrote.

    Returns:
        The content, on the CPU.

    Raises:
        ArgumentError: there is no such file, or safetensors is not installed.
        CheckpointError: the file cannot be read, or holds more than tensors and plain values.
    """
    file = Path(path)
    if not file.is_file():
        raise ArgumentError(f"checkpoint={str(path)!r} is not a file.", path="checkpoint")
    if file.suffix == ".safetensors":
        try:
            from safetensors import SafetensorError
            from safetensors.torch import load_file
        except ImportError as error:
            raise ArgumentError(
                f"checkpoint={str(path)!r} needs the package safetensors: pip install safetensors.", path="checkpoint"
            ) from error
        try:
            return load_file(file)
        except (SafetensorError, *FAILURES) as error:
            raise CheckpointError(_damaged(file, "checkpoint", error)) from error
    return load(
        file,
        {"map_location": "cpu"},
        name="checkpoint",
        trusted="If you trust it, read it yourself with torch.load(path, weights_only=False) and pass the state dict.",
    )


def write(state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> Path:
    """Save a state dict: as safetensors if the name ends so, with ``torch.save`` otherwise.

    Returns:
        The file.

    Raises:
        ArgumentError: safetensors is not installed.
    """
    file = Path(path)
    if file.suffix != ".safetensors":
        with written_whole(file) as opened:
            torch.save(dict(state), opened)
        return file
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise ArgumentError(
            f"path={str(path)!r} needs the package safetensors: pip install safetensors.", path="path"
        ) from error
    # The format holds every tensor once and contiguous; tied weights are written under each of their keys.
    content = save({key: value.detach().clone(memory_format=torch.contiguous_format) for key, value in state.items()})
    with written_whole(file) as opened:
        opened.write(content)
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

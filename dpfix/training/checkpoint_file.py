"""The file of a checkpoint: written whole or not at all, with a checksum of what it holds."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import Any

import torch

from dpfix.errors import CheckpointError
from dpfix.report.finding import Finding
from dpfix.weights.files import FAILURES, load, written_whole

ENTRY = "dpfix"
"""What Opacus leaves out stands under this key."""
CHECKSUM = "checksum"


def write(content: dict[str, Any], path: Any, options: Mapping[str, Any]) -> None:
    """Save a checkpoint; an earlier file of that name is replaced at once, when the new one is complete and on the disk.

    Args:
        content: what it holds; the checksum is added.
        path: file name or binary file.
        options: further arguments of ``torch.save``.

    Raises:
        CheckpointError: it cannot be saved.
    """
    try:
        content[ENTRY][CHECKSUM] = checksum(content)
        if isinstance(path, (str, os.PathLike)):
            with written_whole(path) as file:
                torch.save(content, file, **options)
        else:
            torch.save(content, path, **options)
    except FAILURES as error:
        raise CheckpointError(
            f"the checkpoint could not be saved to path={path!r}: {type(error).__name__}: {error}",
            "An earlier file of that name is as it was.",
            "Pass a file name in a folder that can be written to, and only tensors and plain values in checkpoint_dict.",
            path="path",
        ) from error


def read(path: Any, options: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """Read a checkpoint whole.

    Args:
        path: file name or binary file.
        options: further arguments of ``torch.load``.

    Returns:
        What it holds, and whether a checksum says that this is what was saved.

    Raises:
        CheckpointError: it cannot be read, is no checkpoint of a private training, or holds something else than was saved.
    """
    trusted = "If you trust it, pass torch_load_kwargs={'weights_only': False}."
    content = load(path, options, name="path", trusted=trusted)
    parts = ("module_state_dict", "privacy_accountant_state_dict")
    if not isinstance(content, dict) or not all(isinstance(content.get(name), Mapping) for name in parts):
        raise CheckpointError(
            "the file is no checkpoint of a private training: it needs module_state_dict and privacy_accountant_state_dict.",
            help="For weights alone there is dpfix.load_pretrained.",
            path="path",
        )
    added = content.get(ENTRY, {})
    if not isinstance(added, Mapping):
        raise CheckpointError(damaged(f"its entry {ENTRY!r} is {type(added).__name__}"))
    if CHECKSUM not in added:
        return content, False
    try:
        found = checksum(content)
    except FAILURES as error:
        raise CheckpointError(damaged(f"its checksum cannot be computed ({error})")) from error
    if added[CHECKSUM] != found:
        raise CheckpointError(damaged("its checksum is that of another content"))
    return content, True


def damaged(fact: str, path: str = "path") -> Finding:
    """The refusal of a checkpoint that holds what no training has saved.

    Args:
        fact: what it holds.
        path: the argument that it is about.

    Returns:
        The finding, for a ``CheckpointError``.
    """
    return Finding.refusal(
        "DPF039",
        f"the checkpoint is damaged, was changed after it was saved, or does not fit: {fact}.",
        "a training that goes on from it would not be the one that was saved. Nothing is changed.",
        "take an earlier file, or make the call as before.",
        path=path,
    )


def checksum(content: Mapping[str, Any]) -> str:
    """A checksum of everything a checkpoint holds but itself.

    It is taken of the values, so that it says what was loaded, however the file was written. Objects that are neither
    tensors nor plain values, which only a script's own entries can be, count with their type.

    Args:
        content: of the checkpoint.

    Returns:
        A hexadecimal digest.
    """
    digest = hashlib.sha256()
    added = {name: value for name, value in content.get(ENTRY, {}).items() if name != CHECKSUM}
    _feed(digest, dict(content) | {ENTRY: added})
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        digest.update(f"{value.dtype} {tuple(value.shape)} {value.layout};".encode())
        if value.layout is torch.strided and not value.is_quantized:
            plain = value.detach().resolve_conj().resolve_neg().cpu().contiguous()
            digest.update(plain.reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, Mapping):
        digest.update(f"mapping {len(value)};".encode())
        for key, item in value.items():
            _feed(digest, key)
            _feed(digest, item)
    elif isinstance(value, (list, tuple)):
        digest.update(f"{'tuple' if isinstance(value, tuple) else 'list'} {len(value)};".encode())
        for item in value:
            _feed(digest, item)
    elif value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        text = repr(value).encode(errors="surrogatepass")
        digest.update(f"{type(value).__name__} {len(text)};".encode() + text)
    else:
        digest.update(f"{type(value).__qualname__};".encode())

"""Defaults of torch under which a model cannot be tried."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def no_meta_default() -> Iterator[None]:
    """Inside, new tensors have values: a script may have built its model under the default device ``meta``.

    Any other default is the script's own, which its ``forward`` may rely on.

    Yields:
        Nothing.
    """
    if torch.get_default_device().type != "meta":
        yield
        return
    with torch.device("cpu"):
        yield

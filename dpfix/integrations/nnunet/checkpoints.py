"""nnU-Net's checkpoints, read without running code from them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from dpfix.weights.files import load

_RECONSTRUCT = np.zeros(1).__reduce__()[0]
_SCALAR = np.float64(0).__reduce__()[0]  # type: ignore[reportIndexIssue]
ALLOWED: list[Any] = [_RECONSTRUCT, _SCALAR, np.ndarray, np.dtype, *(type(np.dtype(c)) for c in "?bhilqBHILQefdg")]
"""What nnU-Net logs beside plain values: numbers and arrays of NumPy."""


def read(filename: str) -> dict[str, Any]:
    """What a checkpoint of nnU-Net holds, on the CPU.

    Args:
        filename: of the checkpoint.

    Returns:
        Its entries.
    """
    trusted = "If you trust it, read it with torch.load(path, weights_only=False), and save what nnU-Net's own checkpoints hold."
    with torch.serialization.safe_globals(ALLOWED):
        return load(filename, {"map_location": "cpu"}, name="checkpoint", trusted=trusted)

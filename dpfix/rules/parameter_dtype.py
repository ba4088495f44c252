"""Parameters in which the noise is not what the accountant assumes.

What: trainable parameters that are complex, or in half precision (float16, bfloat16).

Why bad: torch draws complex noise with half the variance per real coordinate (measured: standard deviation 0.705
instead of 1). In half precision a clipped sum of many small terms is rounded, so its sensitivity and its noise are
not those that are accounted.

Example: ``nn.Parameter(torch.randn(4, dtype=torch.cfloat))``; ``model.bfloat16()``.

Use instead: store real and imaginary parts in one real parameter (``torch.view_as_complex`` in forward); keep
float32 parameters and use ``torch.autocast`` for speed.

Fix safety: not fixed; refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dpfix.errors import ModelError
from dpfix.report.finding import Finding, Fixability, Severity

if TYPE_CHECKING:
    from dpfix.scan.scan import Scan

CODE = "DPF009"
TITLE = "a parameter whose noise is not what is accounted"
ERROR = ModelError


def find(scan: Scan) -> Iterator[Finding]:
    """Trainable parameters that are complex or in half precision.

    Args:
        scan: the objects of the call.

    Yields:
        One finding for the first parameter of each dtype, refused.
    """
    seen: set[torch.dtype] = set()
    for parameter, name in scan.parameter_names.items():
        low = parameter.dtype in (torch.float16, torch.bfloat16)
        if not parameter.requires_grad or parameter.dtype in seen or not (parameter.is_complex() or low):
            continue
        seen.add(parameter.dtype)
        yield Finding(
            code=CODE,
            severity=Severity.BREAKS_GUARANTEE,
            fixability=Fixability.REFUSED,
            fact=f"module: parameter `{name}` of {type(scan.module).__name__} is {parameter.dtype}.",
            why="rounding changes the clipped sum and its noise; they are not what is accounted."
            if low
            else "complex noise has half the variance per real coordinate, less than the accountant assumes.",
            help="call module.float() and use torch.autocast for speed."
            if low
            else "keep a real parameter of shape [..., 2] and use torch.view_as_complex in forward.",
            path=name,
        )


def _model(dtype: torch.dtype) -> dict[str, Any]:
    return {"module": nn.Sequential(nn.Linear(6, 3, dtype=dtype))}


VALID = (lambda: _model(torch.float32), lambda: _model(torch.float64))
INVALID = (lambda: _model(torch.bfloat16), lambda: _model(torch.cfloat))

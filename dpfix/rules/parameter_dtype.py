from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from dpfix.report.finding import Finding, Severity
from dpfix.rules.rule import Rule
from dpfix.scan.scan import Scan


class ParameterDtype(Rule):
    """Parameters in which the noise is not what the accountant assumes.

    What: trainable parameters that are complex, or in half precision (float16, bfloat16).

    Why bad: torch draws complex noise with half the variance per real coordinate (measured: standard deviation 0.705
    instead of 1). In half precision a clipped sum of many small terms is rounded, so its sensitivity and its noise are
    not those that are accounted.

    Example: ``nn.Parameter(torch.randn(4, dtype=torch.cfloat))``; ``model.bfloat16()``.

    Use instead: store real and imaginary parts in one real parameter (``torch.view_as_complex`` in forward); keep
    float32 parameters and use ``torch.autocast`` for speed.
    """

    title = "a parameter whose noise is not what is accounted"
    severity = Severity.BREAKS_GUARANTEE

    @override
    def find(self, scan: Scan) -> Iterator[Finding]:
        seen: set[torch.dtype] = set()  # the first parameter of each is told
        for parameter, name in scan.parameter_names.items():
            low = parameter.dtype in (torch.float16, torch.bfloat16)
            if not parameter.requires_grad or parameter.dtype in seen or not (parameter.is_complex() or low):
                continue
            seen.add(parameter.dtype)
            yield self.refusal(
                f"module: parameter `{name}` of {type(scan.module).__name__} is {parameter.dtype}.",
                "rounding changes the clipped sum and its noise; they are not what is accounted."
                if low
                else "complex noise has half the variance per real coordinate, less than the accountant assumes.",
                "call module.float() and use torch.autocast for speed."
                if low
                else "keep a real parameter of shape [..., 2] and use torch.view_as_complex in forward.",
                name,
            )

    VALID = (lambda: _model(torch.float32), lambda: _model(torch.float64))
    INVALID = (lambda: _model(torch.bfloat16), lambda: _model(torch.cfloat))


def _model(dtype: torch.dtype) -> dict[str, Any]:
    return {"module": nn.Sequential(nn.Linear(6, 3, dtype=dtype))}

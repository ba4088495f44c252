from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from typing_extensions import override

from dpfix.instrument.precision import in_bfloat16
from dpfix.report.finding import Finding, Fixability, Severity
from dpfix.rules.rule import Precision, Rule
from dpfix.scan.scan import Scan


class ParameterDtype(Rule):
    """Parameters in which the noise is not what the accountant assumes.

    What: trainable parameters that are complex, or in half precision (float16, bfloat16). Frozen ones may be of any type.

    Why bad: torch draws complex noise with half the variance per real coordinate (measured: standard deviation 0.705
    instead of 1). In half precision a clipped sum of many small terms is rounded, so its sensitivity and its noise are
    not those that are accounted.

    Example: ``nn.Parameter(torch.randn(4, dtype=torch.cfloat))``; ``model.half()``; ``model.bfloat16()``.

    Use instead: store real and imaginary parts in one real parameter (``torch.view_as_complex`` in forward); keep
    float32 parameters and use ``torch.autocast(..., dtype=torch.bfloat16)`` for speed.

    That is what the repair of bfloat16 does: the parameters stay the same objects and become float32, with what the
    optimizer holds of them, and the model's call runs under autocast. Matrix products and convolutions are computed in
    bfloat16 as before; gradients, norms, clipped sums, noise and updates are float32. What the model returns is float32 where
    autocast or a sum with a parameter makes it so. Parts of the model that the script calls by themselves, and methods other
    than ``forward``, run under autocast only if the script says so. What ``dpfix.export_plain`` returns has bfloat16 parameters
    and its own class again; ``to_standard_module()`` returns the model as it was trained. float16 is not repaired: without a
    scaled loss its small gradients are zero.
    """

    title = "a parameter whose noise is not what is accounted"
    severity = Severity.BREAKS_GUARANTEE
    outcomes = {
        Fixability.CHANGES_MODEL: "bfloat16: the parameters become float32, and the model's call runs under autocast.",
        Fixability.REFUSED: "float16 and complex: not fixed.",
    }

    @override
    def find(self, scan: Scan) -> Iterator[Finding]:
        model = type(scan.module).__name__
        seen: set[torch.dtype] = set()  # the first parameter of each is told
        for parameter, name in scan.parameter_names.items():
            half = parameter.dtype is torch.float16
            if not parameter.requires_grad or parameter.dtype in seen or not (parameter.is_complex() or half):
                continue
            seen.add(parameter.dtype)
            yield self.refusal(
                f"module: parameter `{name}` of {model} is {parameter.dtype}.",
                _ROUNDED
                if half
                else "complex noise has half the variance per real coordinate, less than the accountant assumes.",
                "call module.float() and use torch.autocast with dtype=torch.bfloat16 for speed."
                if half
                else "keep a real parameter of shape [..., 2] and use torch.view_as_complex in forward.",
                name,
            )
        found = _in_bfloat16(scan.parameter_names)
        if found:
            name, more = scan.parameter_names[found[0]], f" and {len(found) - 1} more are" if found[1:] else " is"
            single = [f"`{n}`" for p, n in scan.parameter_names.items() if p.dtype is torch.float32 and p.dim() > 1]
            too = (
                f"; what uses the float32 parameters ({', '.join(single[:3])}) is computed in bfloat16 too"
                if single
                else ""
            )
            yield self.finding(
                Fixability.CHANGES_MODEL,
                f"module: parameter `{name}` of {model}{more} torch.bfloat16.",
                _ROUNDED,
                fix="float32 parameters, the same objects, and the model's call under autocast, so that it computes in bfloat16 "
                f"as before{too}; bfloat16 again in an export",
                help="parts of the model that you call by themselves need torch.autocast around the call.",
            )

    @override
    def fix(self, module: nn.Module, scan: Scan) -> Precision:
        return Precision(in_bfloat16(type(module)), _in_bfloat16(module.parameters()), torch.float32)

    VALID = (
        lambda: _model(torch.float32),
        lambda: _model(torch.float64),
    )
    INVALID = (
        lambda: _model(torch.bfloat16),
        lambda: _model(torch.float16),
        lambda: _model(torch.cfloat),
    )


_ROUNDED = "rounding changes the clipped sum and its noise; they are not what is accounted."


def _in_bfloat16(parameters: Iterable[nn.Parameter]) -> tuple[nn.Parameter, ...]:
    """The trainable parameters that are converted; a lazy one is looked at again once it exists."""
    return tuple(p for p in parameters if p.requires_grad and p.dtype is torch.bfloat16 and not is_lazy(p))


def _model(dtype: torch.dtype) -> dict[str, Any]:
    return {"module": nn.Sequential(nn.Linear(6, 3, dtype=dtype))}

"""Per-sample gradients that the script computes itself, as with ``grad_sample_mode="no_op"`` in Opacus.

The loop fills ``p.grad_sample`` (for example with ``torch.func.vmap(torch.func.grad(...))``, Opacus issue #626) and
calls ``optimizer.step()``. Nothing is attached to the model, and what the loop computes cannot be audited beforehand.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from typing_extensions import override

from dpfix.engines.base import Engine, IdleHandle, Verdict, zeros
from dpfix.plan import Plan


class ByHand(Engine):
    """The engine that does nothing."""

    name = "no_op"
    opacus_mode = "no_op"
    audited = False
    owns_gradients = False

    @override
    def supports(self, module: nn.Module, record: Any) -> Verdict:
        return Verdict()

    @override
    def attach(self, module: nn.Module, plan: Plan, prepared: Any = None) -> ByHandHandle:
        return ByHandHandle(module)


class ByHandHandle(IdleHandle):
    """Reads what the script left on the parameters."""

    @override
    def collect(self, parameters: list[nn.Parameter]) -> list[int]:
        """Count the samples, and fill in zeros for parameters that the script left out."""
        found = [p.grad_sample for p in parameters if getattr(p, "grad_sample", None) is not None]  # type: ignore[attr-defined]
        if not found:
            return []
        if isinstance(found[0], list):
            return [len(g) for g in found[0]]
        for p in parameters:
            if getattr(p, "grad_sample", None) is None:
                p.grad_sample = zeros(p, len(found[0]))  # type: ignore[attr-defined]
        return [len(found[0])]

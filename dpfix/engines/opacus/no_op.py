"""Per-sample gradients that the script computes itself, as with ``grad_sample_mode="no_op"`` in Opacus.

The loop fills ``p.grad_sample`` (for example with ``torch.func.vmap(torch.func.grad(...))``, Opacus issue #626) and
calls ``optimizer.step()``. Nothing is attached to the model, and what the loop computes cannot be audited beforehand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from dpfix.engines.base import Engine, Handle, Verdict, no_counts, zeros
from dpfix.plan import Plan


class ByHand(Engine):
    """The engine that does nothing."""

    name = "no_op"
    opacus_mode = "no_op"
    audited = False
    owns_gradients = False

    def supports(self, module: nn.Module, record: Any) -> Verdict:
        """Works with any model.

        Args:
            module: the repaired model.
            record: what the probe showed.

        Returns:
            An empty verdict.
        """
        return Verdict()

    def attach(self, module: nn.Module, plan: Plan, prepared: Any = None) -> ByHandHandle:
        """Attach nothing.

        Args:
            module: the repaired model.
            plan: not used.
            prepared: not used.

        Returns:
            The handle.
        """
        return ByHandHandle(module)


class ByHandHandle(Handle):
    """Reads what the script left on the parameters.

    Args:
        module: the model.
    """

    def __init__(self, module: nn.Module) -> None:
        self.model = module
        self.counts: Callable[[], tuple[int, ...]] = no_counts

    def collect(self, parameters: list[nn.Parameter]) -> list[int]:
        """Count the samples and fill in zeros for parameters the script left out.

        Args:
            parameters: the trainable parameters.

        Returns:
            Number of samples, or nothing if no parameter has ``grad_sample``.
        """
        found = [p.grad_sample for p in parameters if getattr(p, "grad_sample", None) is not None]  # type: ignore[attr-defined]
        if not found:
            return []
        if isinstance(found[0], list):
            return [len(g) for g in found[0]]
        for p in parameters:
            if getattr(p, "grad_sample", None) is None:
                p.grad_sample = zeros(p, len(found[0]))  # type: ignore[attr-defined]
        return [len(found[0])]

    def clear(self) -> None:
        """Nothing is kept here."""

    def finish(self) -> None:
        """Nothing is kept here."""

    def detach(self) -> None:
        """Nothing is attached."""

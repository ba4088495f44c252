"""What the call asks for, apart from the objects it works on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

OPACUS_MODES = ("hooks", "functorch", "ew")
"""Modes of ``grad_sample_mode`` in which Opacus computes per-sample gradients."""

NORMS = ("group", "instance", "layer")
"""Legal values of ``norm``."""


@dataclass(frozen=True)
class Options:
    """What the call asks for, apart from the objects it works on.

    Attributes:
        grad_sample_mode: the mode asked for by name, or ``"auto"``.
        norm: what replaces BatchNorm: ``"group"``, ``"instance"`` or ``"layer"``.
        clipping: Opacus's clipping scheme.
        max_grad_norm: the clip norm, or one per parameter for per-layer clipping.
        poisson_sampling: whether the loader is to draw Poisson batches.
        no_grad_regions: whether module calls that no gradient comes back to run without a graph.
        cache: whether the order of the engines is remembered for the next run.
    """

    grad_sample_mode: str = "auto"
    norm: str = "group"
    clipping: str = "flat"
    max_grad_norm: Any = 1.0
    poisson_sampling: bool = True
    no_grad_regions: bool = True
    cache: bool = True

    @property
    def opacus_only(self) -> bool:
        """Whether an engine of Opacus was asked for by name."""
        return self.grad_sample_mode in OPACUS_MODES

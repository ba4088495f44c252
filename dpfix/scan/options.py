"""What a call asks for, apart from the objects it works on.

The fields have the names of the arguments of :func:`dpfix.make_private_safe`, whose signature alone holds the defaults.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dpfix.sampling.augmentation import AugmentationMultiplicity

OPACUS_MODES = ("hooks", "functorch", "ew")
"""Modes of ``grad_sample_mode`` in which Opacus computes per-sample gradients."""

SAMPLINGS = ("poisson", "truncated", "shuffle", "fixed")
"""Legal values of ``sampling``."""

NORMS = ("group", "instance", "layer", "folded")
"""Legal values of ``norm``."""


@dataclass(frozen=True)
class PrivacyOptions:
    """What decides what is released, and with which guarantee.

    Attributes:
        clipping: how the gradient of a sample is clipped: one of ``CLIPPING``.
        max_grad_norm: the clip norm, or one per parameter for per-layer clipping, by pattern for named groups.
        stability_constant: of automatic clipping, or ``None``.
        poisson_sampling: whether a loader of dpfix's takes the place of the script's; ``sampling`` decides where it is given.
        sampling: how batches are drawn: one of ``SAMPLINGS``; ``None`` until it follows from ``poisson_sampling``.
        loss_reduction: ``"mean"`` or ``"sum"`` over the samples.
        augmentation: makes several views of every sample, if that is asked for.
        privacy_unit: who an item belongs to, as it was given; a :class:`~dpfix.sampling.people.People` once it is known.
        items_per_unit: items of a person in a batch at most, or ``None``.
        norm: what replaces BatchNorm, which mixes samples: ``"group"``, ``"instance"``, ``"layer"``, or ``"folded"``; the
            released model is another one for each.
        noise_generator: the script's source of the noise, or ``None``.
        seed: makes noise and draws reproducible, or ``None``.
        checks: share of the training time that checks of random real steps may take.
        strict: whether a loop that cannot be followed is refused.
    """

    clipping: str
    max_grad_norm: Any
    stability_constant: Any
    poisson_sampling: bool
    sampling: Any
    loss_reduction: str
    augmentation: AugmentationMultiplicity | None = field(repr=False)  # it shows an address, which no two ranks share
    privacy_unit: Any = field(repr=False)  # names of persons; ranks compare them by the data's fingerprint
    items_per_unit: Any
    norm: str
    noise_generator: Any = field(repr=False)
    seed: int | None = field(repr=False)  # who knows it can compute the noise
    checks: float
    strict: bool

    @property
    def reproducible(self) -> bool:
        """Whether the script can compute the noise again."""
        return self.seed is not None or self.noise_generator is not None


@dataclass(frozen=True)
class PerformanceOptions:
    """How the clipped sum is computed; whatever is asked for here is audited, and releases the same.

    Attributes:
        grad_sample_mode: the engine asked for by name, or ``"auto"``.
        batch_first: whether Opacus's engines find the samples in dimension 0; wrongly said, they fail the audit.
        no_grad_regions: whether module calls that no gradient comes back to run without a graph.
        cache: whether the order of the engines is remembered for the next run.
        max_physical_batch_size: samples that are delivered together at most, ``"auto"``, or ``None`` for whole batches.
    """

    grad_sample_mode: str
    batch_first: bool
    no_grad_regions: bool
    cache: bool
    max_physical_batch_size: Any

    @property
    def opacus_only(self) -> bool:
        """Whether an engine of Opacus was asked for by name."""
        return self.grad_sample_mode in OPACUS_MODES

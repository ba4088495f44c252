"""The privacy statement: what was guaranteed, under which assumptions, and what is not covered."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

MOST_SHOWN = 100
"""Entries of a schedule that are printed."""


@dataclass(frozen=True)
class Stretch:
    """Steps in a row with equal settings.

    Attributes:
        steps: how many.
        noise_multiplier: standard deviation of the noise as a multiple of the clip norm.
        sampling_rate: probability with which a sample enters a batch.
        max_grad_norm: the clip norm; a word where it changes on every step, ``None`` where nobody wrote it down.
    """

    steps: int
    noise_multiplier: float
    sampling_rate: float
    max_grad_norm: float | list[float] | str | None = None

    @property
    def setting(self) -> tuple[float, float, float | list[float] | str | None]:
        """What the steps have in common."""
        return self.noise_multiplier, self.sampling_rate, self.max_grad_norm

    def __str__(self) -> str:
        clip = "unknown" if self.max_grad_norm is None else self.max_grad_norm
        return (
            f"{self.steps} steps: noise multiplier {self.noise_multiplier:g}, sampling rate {self.sampling_rate:.6g}, clip "
            f"norm {clip}"
        )


@dataclass(frozen=True)
class PrivacyStatement:
    """Everything a reader needs to judge an epsilon.

    After the checklist of Ponomareva et al. 2023, "How to DP-fy ML", https://arxiv.org/abs/2303.00654.

    Attributes:
        epsilon: privacy loss at ``delta``, at least 0; infinite if any step was made without noise.
        delta: the delta it holds for.
        unit: what one sample is.
        adjacency: which pairs of datasets are compared.
        sampling_used: how batches were drawn.
        sampling_assumed: what the accountant assumes.
        samples: number of samples that can be drawn; of persons where they are the unit.
        sampling_rate: probability with which a sample enters a release that is accounted; 1 where no chance is counted on.
        steps: releases that were accounted: optimizer steps, or passes where a pass is one.
        noise_multiplier: standard deviation of the noise as a multiple of the clip norm.
        max_grad_norm: the clip norm C: how far a sample moves the sum that the noise is added to.
        accountant: name of the accounting that gave ``epsilon``; ``rdp`` where the engine's own could not answer.
        secure_rng: whether noise came from a cryptographic generator.
        not_covered: what the guarantee does not speak about.
        cautions: what weakens the claim as it stands.
        counted: what they are called: samples, or persons.
        clipping: how the gradient of a sample is made no longer than C.
        schedule: all steps, entry by entry; several where a setting has changed, or an earlier training had others.
        budget: what all trainings on the same data have spent together, where they share a budget.
    """

    epsilon: float
    delta: float
    unit: str
    adjacency: str
    sampling_used: str
    sampling_assumed: str
    samples: int
    sampling_rate: float
    steps: int
    noise_multiplier: float
    max_grad_norm: float | list[float]
    accountant: str
    secure_rng: bool
    not_covered: tuple[str, ...]
    cautions: tuple[str, ...] = ()
    schedule: tuple[Stretch, ...] = ()
    clipping: str = "flat"
    budget: str = ""
    counted: str = "samples"

    def rows(self) -> list[tuple[str, str]]:
        """What is said in a line each: name and text."""
        return [
            ("guarantee", f"({self.epsilon:.4g}, {self.delta:.3g})-differential privacy"),
            ("unit", self.unit),
            ("adjacency", self.adjacency),
            ("sampling used", self.sampling_used),
            ("sampling assumed", self.sampling_assumed),
            (self.counted, str(self.samples)),
            ("sampling rate", f"{self.sampling_rate:.6g}"),
            ("steps", str(self.steps)),
            ("noise multiplier", f"{self.noise_multiplier:g} (times the clip norm)"),
            ("clip norm", str(self.max_grad_norm)),
            ("clipping", self.clipping),
            ("accountant", self.accountant),
            *([("budget of the data", self.budget)] if self.budget else []),
            (
                "noise generator",
                "cryptographic" if self.secure_rng else "torch's, the training's own (not cryptographic)",
            ),
        ]

    def __str__(self) -> str:
        lines = ["privacy statement", *(f"  {name + ':':18s} {value}" for name, value in self.rows())]
        if len(self.schedule) > 1:
            shown = [str(stretch) for stretch in self.schedule[:MOST_SHOWN]]
            more = [f"{len(self.schedule) - MOST_SHOWN} more; to_json() has all"] if self.schedule[MOST_SHOWN:] else []
            lines += ["  schedule:"] + [f"    - {item}" for item in shown + more]
        lines += ["  not covered:"] + [f"    - {item}" for item in self.not_covered]
        if self.cautions:
            lines += ["  cautions:"] + [f"    - {item}" for item in self.cautions]
        return "\n".join(lines)

    def to_json(self) -> str:
        """The statement as JSON.

        Returns:
            An object with the attributes as keys.
        """
        return json.dumps(asdict(self), indent=2)


ADJACENCY = (
    "add or remove one {unit}: its gradient is there or is zero, while the number of {unit}s, the sampling rate and the expected "
    "batch size, which divides the sum, are the same public numbers for both data sets (zero-out adjacency)"
)
"""Which pairs of data sets are compared, of a unit that is a sample or a person.

Rate and divisor follow from the number of samples N. They are the same for neighbours, so that neighbours are data sets of N
indices of which one may be empty: definition 1.1 of Kairouz et al. 2021, https://arxiv.org/abs/2103.00039, and
``REPLACE_SPECIAL`` of ``dp-accounting``. Epsilon is that of adding or removing a sample under a given rate.
"""

UNIT = "one item of the dataset"
"""Whose privacy it is."""

SAMPLING = {
    "poisson": ("Poisson", "Poisson"),
    "truncated": ("Poisson, cut to a largest batch", "Poisson; a cut is rarer than 1e-30 per draw"),
    "shuffle": (
        "the loader's own order, every sample once a pass",
        "none by chance: a sample is in one release of every pass",
    ),
    "fixed": ("the loader's own order", "none by chance: a sample may be in every release"),
}
"""How batches were drawn, and what the accounting makes of it, for each way of sampling."""

SELECTION = "hyper-parameters, architecture and stopping time that were chosen by looking at the same data"
SELECTION_WITH_BUDGET = (
    f"{SELECTION}: not covered by this epsilon, and by the budget's only as far as all that was looked at are trainings in "
    "its file"
)
"""What is left of it where trainings share a budget."""
NOT_COVERED = (
    SELECTION,
    "the validation set: metrics and checkpoints selected on it",
    "losses and metrics logged on training batches",
    "statistics of the data used in preprocessing (means, intensity ranges, vocabularies)",
    "what pretrained weights already hold of their own training data",
    "other models that the loop trains on the same samples: covered are the private model and what learns from its outputs alone",
)
"""What a guarantee of DP-SGD does not speak about."""

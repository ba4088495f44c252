"""The privacy statement: what was guaranteed, under which assumptions, and what is not covered."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass


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
        samples: number of samples that can be drawn.
        sampling_rate: probability with which a sample enters a batch.
        steps: optimizer steps that were accounted.
        noise_multiplier: standard deviation of the noise as a multiple of the clip norm.
        max_grad_norm: the clip norm.
        accountant: name of the accounting that gave ``epsilon``; ``rdp`` where the engine's own could not answer.
        secure_rng: whether noise came from a cryptographic generator.
        not_covered: what the guarantee does not speak about.
        cautions: what weakens the claim as it stands.
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

    def __str__(self) -> str:
        rows = [
            ("guarantee", f"({self.epsilon:.4g}, {self.delta:.3g})-differential privacy"),
            ("unit", self.unit),
            ("adjacency", self.adjacency),
            ("sampling used", self.sampling_used),
            ("sampling assumed", self.sampling_assumed),
            ("samples", str(self.samples)),
            ("sampling rate", f"{self.sampling_rate:.6g}"),
            ("steps", str(self.steps)),
            ("noise multiplier", f"{self.noise_multiplier:g} (times the clip norm)"),
            ("clip norm", str(self.max_grad_norm)),
            ("accountant", self.accountant),
            (
                "noise generator",
                "cryptographic" if self.secure_rng else "torch's, the training's own (not cryptographic)",
            ),
        ]
        lines = ["privacy statement", *(f"  {name + ':':18s} {value}" for name, value in rows)]
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


NOT_COVERED = (
    "hyper-parameters, architecture and stopping time that were chosen by looking at the same data",
    "the validation set: metrics and checkpoints selected on it",
    "losses and metrics logged on training batches",
    "statistics of the data used in preprocessing (means, intensity ranges, vocabularies)",
    "what pretrained weights already hold of their own training data",
)
"""What a guarantee of DP-SGD does not speak about."""

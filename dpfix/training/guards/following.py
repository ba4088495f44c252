"""What is known beforehand about the steps that a loop will make."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from dpfix.observe.training_step import TrainingStep
from dpfix.training.follow.agenda import SHARE
from dpfix.training.follow.collation import Collation
from dpfix.training.follow.delivery import BatchLayout


@dataclass(frozen=True)
class Following:
    """What is known beforehand about the real steps.

    Attributes:
        step: the training step of the call, told or inferred.
        batches: how the loader's batches carry their samples.
        share: share of the training time that checks of later steps may take.
        strict: whether a step that cannot be followed is refused.
    """

    step: TrainingStep | None = None
    batches: BatchLayout = field(default_factory=BatchLayout)
    share: float = SHARE
    strict: bool = False

    @cached_property
    def collation(self) -> Collation:
        """Makes the loader's batches, and looks at some of them; a quarter of the share is its."""
        return Collation(self.batches, 0.25 * self.share)

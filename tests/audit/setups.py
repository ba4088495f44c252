"""What the tests of observation and audit share: a model with samples and a step, looked at as the call does it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from dpfix.audit.clipped_sum import check_engine, movement
from dpfix.audit.reference import Reference, Trial, reference
from dpfix.audit.released import released_sums
from dpfix.engines import Engine
from dpfix.observe import probe
from dpfix.observe.probe import Probe
from dpfix.observe.record import StepRecord
from dpfix.observe.run import observe
from dpfix.observe.training_step import Subject, TrainingStep
from dpfix.plan import Plan
from dpfix.report.report import EngineEvidence
from tests.cases import classify
from tests.reference import Step


@dataclass(frozen=True)
class Looked:
    """A model that was observed on a probe, ready for the audit of engines."""

    model: nn.Module
    step: TrainingStep
    samples: Probe
    record: StepRecord
    plan: Plan
    wanted: Reference

    @property
    def subject(self) -> Subject:
        """The model with its step."""
        return Subject(self.model, self.step)

    @property
    def trial(self) -> Trial:
        """The probe with what it showed."""
        return Trial(self.samples, self.record, self.wanted)

    def check(self, engine: Engine) -> EngineEvidence:
        """What the audit says about an engine."""
        return check_engine(engine, self.subject, self.trial, self.plan)

    def movement(self, engine: Engine, sample: int) -> float:
        """How far leaving one sample out moves what an engine releases, at most, in units of the clip norm."""
        plan, norms = self.plan.with_engine(engine), self.wanted.clip_norms
        sums = [
            released_sums(engine, self.subject, replace(self.trial, samples=samples), plan, norms)
            for samples in (self.samples, self.samples.without(sample))
        ]
        return max(movement(every, fewer, norm) for every, fewer, norm in zip(*sums, norms, strict=True))

    def check_bounded(self, engine: Engine, sample: int) -> EngineEvidence:
        """What the audit says about an engine when leaving one sample out is tried too."""
        return check_engine(engine, self.subject, self.trial, self.plan, left_out=sample)


def look(
    model: nn.Module,
    items: list[Any],
    step: Step = classify,
    collate: Callable[[list[Any]], Any] = default_collate,
    loss_reduction: str = "mean",
) -> Looked:
    """Observe a model, without repairs and without freezing what is unused."""
    loader: DataLoader[Any] = DataLoader(items, batch_size=4, collate_fn=collate)  # type: ignore[arg-type]
    samples = probe.take(loader)
    training_step = TrainingStep(step, "test", loss_known=True)
    record = observe(Subject(model, training_step), samples)
    plan = Plan(
        "",
        "",
        record.calls,
        record.layers,
        record.elsewhere,
        loss_reduction=loss_reduction,
        help_vmap=record.needs_workarounds,
    )
    return Looked(model, training_step, samples, record, plan, reference(record, record.unused))


def labelled(*shape: int, samples: int = 4, classes: int = 3) -> list[tuple[Tensor, int]]:
    """Samples ``(x, y)`` of different size, in double precision."""
    draw = torch.Generator().manual_seed(5)
    return [((0.5 + i) * torch.randn(shape, generator=draw, dtype=torch.float64), i % classes) for i in range(samples)]

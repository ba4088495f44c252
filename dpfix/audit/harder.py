"""Harder probes: what depends on the data or on chance is provoked, and everything is checked again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from dpfix.audit.isolation import check_isolation
from dpfix.audit.persistent_state import check_inside
from dpfix.audit.reference import Trial, reference
from dpfix.errors import USER_CODE_ERRORS, CoupledModelError, LossError, TrainingStepError
from dpfix.instrument import pytree
from dpfix.instrument.fixed_randomness import DRAWS, Draw
from dpfix.observe.one_step import decided_by_rounding
from dpfix.observe.probe import Probe
from dpfix.observe.provoke import emptied, provoked, shortened
from dpfix.observe.record import StepRecord
from dpfix.observe.run import observe
from dpfix.observe.training_step import Subject
from dpfix.plan import Plan
from dpfix.report.report import Proof

_LARGER = 1e6
"""A sample whose gradient is so much larger than the others' (1e21 times in VNet) drowns them in any sum of floats."""

_SLACK = 5.0
"""How many times more rounding is allowed on the harder probes."""

_PAIR = 2
"""Samples that are enough to see under another draw whether they are mixed."""


@dataclass(frozen=True)
class Harder:
    """Makes harder probes and checks model and loss on each.

    Attributes:
        subject: the model and the step.
        ordinary: the ordinary probe with what it showed.
        plan: how the model is to be trained.
        criterion: the criterion of the call, to name the cause of a coupling.
    """

    subject: Subject
    ordinary: Trial
    plan: Plan
    criterion: Callable[..., Any] | None

    def provoked(self, inputs: tuple[pytree.Path, ...]) -> tuple[Trial, ...]:
        """Probes with an empty mask, a rare label, an outlier, shorter samples, as far as the step takes them.

        Args:
            inputs: places in a sample that the model sees.

        Returns:
            Those on which an engine is to be checked too. A sample of zeros belongs to none of them: behind a
            normalisation its gradient is made of rounding errors, on which two right engines need not agree.
        """
        trials: list[Trial] = []
        for number, make in enumerate(provoked(self.ordinary.samples)):
            if number == 1 and trials:
                break  # the first one has every provocation in it
            trial = self.attempt(make)
            if trial is not None:
                trials.append(trial)
        self.attempt(partial(shortened, self.ordinary.samples, inputs))
        return tuple(trials)

    def emptied(self) -> Trial | None:
        """The probe with a sample of zeros, if the step can take it."""
        return self.attempt(partial(emptied, self.ordinary.samples))

    def drawn_otherwise(self) -> list[Proof]:
        """Other draws, where the step draws what may decide a branch.

        Returns:
            A proof for the report if there are any.
        """
        tried = [self.attempt(self._pair, draw) for draw in _telling(self.subject, self.ordinary.record)]
        count = sum(trial is not None for trial in tried)
        if not count:
            return []
        shown = f"the same under {count} other draw(s) of what is random"
        return [Proof("isolated", shown, "model and loss again, with everything random drawn anew", {"draws": count})]

    def _pair(self) -> Probe:
        return self.ordinary.samples.changed(lambda i, path, leaf: leaf, _PAIR)

    def attempt(self, make: Callable[[], Probe | None], draw: Draw = DRAWS[0]) -> Trial | None:
        """Check model and loss on a harder probe, or under another draw.

        Returns:
            The trial; ``None`` if the step cannot take it, or if it is the ordinary one.

        Raises:
            CoupledModelError: an output of the model mixes samples.
            LossError: the loss does.
        """
        subject, plan = self.subject, self.plan
        try:
            changed = make()
            if changed is None or (None not in changed.unchanged and draw is DRAWS[0]):
                return None
            record = observe(subject, changed, self.ordinary.record, draw)
            trial = Trial(
                changed, record, reference(record, plan.frozen_parameters, plan.share(record.counts)), _SLACK, draw
            )
        except (TrainingStepError, CoupledModelError, *USER_CODE_ERRORS):
            return None  # no legal sample for this model: an index out of range, a division by zero
        if float(trial.wanted.norms.max()) > _LARGER * float(trial.wanted.norms.median()):
            return None
        check_inside(subject.module, record)
        try:
            check_isolation(subject, trial, plan, self.criterion)
        except (CoupledModelError, LossError):
            if decided_by_rounding(subject, changed, trial.wanted.tolerance):
                return None
            raise
        return trial


def _telling(subject: Subject, record: StepRecord) -> Iterator[Draw]:
    """Draws under which a step may go another way."""
    together, single = record.together, record.alone[0]
    if not (together.decides or single.decides or together.drew_outside or subject.generators):
        return
    for draw in DRAWS[1:]:
        # operations that draw for one sample after the other are more in the batch than for a sample alone
        if not draw.apart or (together.drawn, together.drawn_outside) == (single.drawn, single.drawn_outside):
            yield draw

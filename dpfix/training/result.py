"""What the call returns."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from opacus import PrivacyEngine

from dpfix.instrument.source import warn_user
from dpfix.plan import Plan
from dpfix.report import page, text
from dpfix.report.curve import EpsilonCurve
from dpfix.report.report import Report
from dpfix.report.statement import ADJACENCY, NOT_COVERED, SAMPLING, PrivacyStatement
from dpfix.sampling.inner_loader import inner_loader
from dpfix.sampling.people import unit_in_words, unit_of
from dpfix.sampling.rate import BY_CHANCE, accounted_compositions, accounted_rate, index_set, sampling_of
from dpfix.scan.arguments import check_delta
from dpfix.training import certificate
from dpfix.training.accounting import accounted_steps
from dpfix.training.epsilon import Accuracy, spent, steps_without_noise
from dpfix.training.epsilon_curve import epsilon_curve
from dpfix.training.progress import Progress
from dpfix.training.releases import book_of, settled
from dpfix.training.shared_state import load_into, state_of

PASSES_SHOWN = 10
"""Passes over the data that a page looks ahead where nobody has said how long the training is."""


@dataclass(frozen=True)
class Target:
    """What a training was planned for.

    Attributes:
        epsilon: at the end.
        delta: of it.
        releases: how many there are then.
    """

    epsilon: float
    delta: float
    releases: int

    def __str__(self) -> str:
        return f"epsilon {self.epsilon:g} at delta {self.delta:g} is planned for after {self.releases} releases"


class PrivateTraining(tuple[Any, ...]):
    """What the call returns: unpacks to ``(model, optimizer, data_loader)`` like Opacus's tuple.

    Attributes:
        privacy_engine: the engine whose accountant counts the steps.
    """

    privacy_engine: PrivacyEngine
    _report: Report
    _target: Target | None
    _progress: Progress | None

    def __new__(cls, items: tuple[Any, ...], report: Report, privacy_engine: PrivacyEngine) -> PrivateTraining:
        """Build the tuple.

        Args:
            items: model, optimizer and loader.
            report: the report of the call.
            privacy_engine: the engine.

        Returns:
            The tuple with its attributes.
        """
        self = super().__new__(cls, items)
        self._report, self.privacy_engine, self._target, self._progress = report, privacy_engine, None, None
        return self

    def with_objects(self, *items: Any) -> PrivateTraining:
        """The same training with other objects in the tuple.

        Args:
            *items: model, optimizer and loader, or wrappers of them.

        Returns:
            The tuple with its attributes.
        """
        return self._like(items, self._report)

    def with_report(self, report: Report) -> PrivateTraining:
        """The same training with another report.

        Args:
            report: what is to be told.

        Returns:
            The tuple with its attributes.
        """
        return self._like(self, report)

    def _like(self, items: tuple[Any, ...], report: Report) -> PrivateTraining:
        made = PrivateTraining(tuple(items), report, self.privacy_engine)
        made._target = self._target
        return made

    @property
    def report(self) -> Report:
        """What was found, changed and chosen; where the first real step decides, complete after it."""
        calls = self[1].__dict__.get("real_calls")
        report = self._report if calls is None or calls.report is None else calls.report
        if self._target is None:
            return report
        return replace(report, settings={**report.settings, text.TARGET: str(self._target)})

    @property
    def plan(self) -> Plan:
        """How the model is being trained; a no-grad region that gradient has reached is no longer in it."""
        return self[1].guard.plan

    def state_dict(self) -> dict[str, Any]:
        """Weights, the optimizer's state and what was released, for ``torch.distributed.checkpoint``.

        ``torch.distributed.checkpoint.save({"training": private}, checkpoint_id=folder)`` calls it, on every process.

        Returns:
            Every process's part of a model on which ``fully_shard`` was called, the whole of others.
        """
        return state_of(self[1])

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave, with any number of processes; make the same call before.

        ``torch.distributed.checkpoint.load({"training": private}, checkpoint_id=folder)`` calls it, on every process. The budget
        goes on; noise and draws are new ones, and a pass over the loader begins.

        Args:
            state_dict: the state.

        Raises:
            CheckpointError: it does not say what was released, or is of other units.
        """
        load_into(self[1], state_dict)

    def get_epsilon(
        self, delta: float, *, alphas: Any = None, eps_error: float | None = None, delta_error: float | None = None
    ) -> float:
        """Privacy loss of the steps made so far.

        Where the engine's accountant cannot answer in seconds (tiny noise, very many steps), Renyi accounting bounds the same
        steps, with a warning.

        Args:
            delta: probability in (0, 1) that the bound does not hold; smaller than 1 / number of samples, or of persons.
            alphas: orders of Renyi accounting; Opacus's if not given.
            eps_error: by how much the PRV accountant may overstate epsilon; 0.01 if not given.
            delta_error: what it may use up of delta; a thousandth if not given.

        Returns:
            Epsilon, at least 0; infinite if any step was made without noise, 0 before the first step.

        Raises:
            ArgumentError: ``delta`` is not a number between 0 and 1, or another argument is not legal.
        """
        delta = check_delta(delta)
        accuracy = Accuracy.of(delta, alphas=alphas, eps_error=eps_error, delta_error=delta_error)
        loader = inner_loader(self[-1])
        samples, unit = len(index_set(loader)), unit_of(loader)
        if delta >= 1 / samples:
            warn_user(
                f"delta={delta:g} is not smaller than 1 / number of {unit}s = {1 / samples:.2g}: publishing one random {unit} "
                "would satisfy such a bound. Use a smaller delta."
            )
        return spent(settled(self.privacy_engine), delta, accuracy).epsilon

    def statement(self, delta: float) -> PrivacyStatement:
        """The privacy statement for the steps made so far.

        Args:
            delta: see :meth:`get_epsilon`.

        Returns:
            Unit, adjacency, sampling, rate, steps, noise, clip norm, accountant, epsilon and what is not covered.
        """
        delta = check_delta(delta)
        optimizer, loader = self[1], inner_loader(self[-1])
        sampling = sampling_of(loader)
        samples, unit = len(index_set(loader)), unit_of(loader)
        cautions = []
        if delta >= 1 / samples:
            cautions.append(f"delta is not below 1 / {unit}s = {1 / samples:.2g}; such a bound means little")
        if sampling not in BY_CHANCE:
            cautions.append(
                "batches were not Poisson samples: nothing is gained by chance, and epsilon is larger for it"
            )
        engine = self.privacy_engine
        given = optimizer.randomness.seed is not None or optimizer.generator is not None
        if given and not engine.secure_mode:
            cautions.append(
                "the noise can be computed again from the seed or generator that the script gave: it protects nobody from "
                "whoever knows that seed"
            )
        accountant = settled(engine)
        steps, noiseless = accounted_steps(accountant), steps_without_noise(accountant)
        if noiseless:
            cautions.append(f"{noiseless} of {steps} steps were made without noise: there is no privacy")
        elif optimizer.noise_multiplier == 0:
            cautions.append("no noise is added: there will be no privacy after the first step")
        loss, spender = spent(accountant, delta), optimizer.guard.guarded.accounting.spender
        return PrivacyStatement(
            epsilon=loss.epsilon,
            delta=delta,
            unit=unit_in_words(loader),
            adjacency=ADJACENCY.format(unit=unit),
            sampling_used=SAMPLING[sampling][0],
            sampling_assumed=SAMPLING[sampling][1],
            samples=samples,
            sampling_rate=accounted_rate(loader, sampling),
            steps=steps,
            noise_multiplier=float(optimizer.noise_multiplier),
            max_grad_norm=optimizer.max_grad_norm,
            accountant=loss.mechanism,
            secure_rng=bool(engine.secure_mode),
            not_covered=NOT_COVERED if spender is None else spender.not_covered(),
            cautions=tuple(cautions),
            schedule=tuple(book_of(engine).stretches()),
            clipping=self.plan.clipping.words(),
            budget="" if spender is None else spender.cited(),
            counted=f"{unit}s",
        )

    def __str__(self) -> str:
        delta = self._shown_delta()
        return text.short(self.report, EpsilonCurve(delta, (self._spent_now(delta),), counted=self._counted()))

    def to_html(self, delta: float | None = None) -> str:
        """The report as one HTML page, with the privacy statement, and epsilon over the steps so far and to come.

        Args:
            delta: of statement and epsilon. If not given, that of ``target_delta``, or one tenth of 1 / number of samples (of
                persons); the page says which.

        Returns:
            The page as a string; it needs no other file.
        """
        delta = self._shown_delta() if delta is None else check_delta(delta)
        return page.document(self.report, self.statement(delta), self._curve(delta))

    def certificate(
        self, delta: float, path: str | os.PathLike[str] | None = None, *, key: bytes | str | None = None
    ) -> dict[str, Any]:
        """What was guaranteed, by which code and on which proofs, for :func:`dpfix.verify_certificate` to check later.

        Args:
            delta: see :meth:`get_epsilon`.
            path: a file that it is written to.
            key: a secret of at least 16 bytes; who holds it finds every change. Without one, whoever changes the file can compute
                its digest anew.

        Returns:
            The certificate, in values that JSON has.
        """
        secret = None if key is None else certificate.legal_key(key)
        made = certificate.sealed(certificate.certificate_of(self.statement(delta), self.plan, self.report), secret)
        if path is not None:
            certificate.write(made, path)
        return made

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        delta = self._shown_delta()
        return page.fragment(self.report, self.statement(delta), self._curve(delta))

    def progress(self, delta: float | None = None) -> dict[str, str]:
        """What a progress bar shows: ``bar.set_postfix(private.progress())``.

        It may be called on every step: epsilon is computed anew only as often as it takes 1 % of the time, and stands beside the
        step that it is for. :meth:`get_epsilon` answers for this moment.

        Args:
            delta: if not given, that of the call before, or as in :meth:`to_html`.

        Returns:
            Epsilon with its delta, and the step, as texts.
        """
        if delta is None:
            delta = self._shown_delta() if self._progress is None else self._progress.delta
        delta = check_delta(delta)
        if self._progress is None or self._progress.delta != delta:
            self._progress = Progress(delta, lambda: self._spent_now(delta))
        steps, epsilon = self._progress.now()
        return {"epsilon": f"{epsilon:.3g} (delta {delta:g})", self._counted(): str(steps)}

    def _spent_now(self, delta: float) -> tuple[int, float]:
        accountant = settled(self.privacy_engine)
        return accounted_steps(accountant), spent(accountant, delta).epsilon

    def _shown_delta(self) -> float:
        return 0.1 / len(index_set(inner_loader(self[-1]))) if self._target is None else self._target.delta

    def _counted(self) -> str:
        return "passes" if sampling_of(inner_loader(self[-1])) == "shuffle" else "steps"

    def _curve(self, delta: float) -> EpsilonCurve:
        optimizer, loader, accountant = self[1], inner_loader(self[-1]), settled(self.privacy_engine)
        sampling, made = sampling_of(loader), accounted_steps(accountant)
        if self._target is None:
            further, words = (
                accounted_compositions(len(loader), sampling, PASSES_SHOWN),
                f"{PASSES_SHOWN} passes further",
            )
        else:
            further, words = max(0, self._target.releases - made), "as it was planned"
        entry = float(optimizer.noise_multiplier), accounted_rate(loader, sampling), further
        return epsilon_curve(
            accountant, delta, (entry, f"{words}, if the settings stay") if further else None, self._counted()
        )


def planned(training: PrivateTraining, epsilon: float, delta: float, releases: int) -> PrivateTraining:
    """Note what a training was planned for.

    Args:
        training: fresh.
        epsilon: at the end.
        delta: of it.
        releases: how many are to be made.

    Returns:
        The training.
    """
    already = accounted_steps(settled(training.privacy_engine))
    training._target = Target(epsilon, delta, already + releases)
    return training

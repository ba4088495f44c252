"""What the call returns."""

from __future__ import annotations

from typing import Any

from opacus import PrivacyEngine

from dpfix.instrument.source import warn_user
from dpfix.plan import Plan
from dpfix.report.report import Report
from dpfix.report.statement import ADJACENCY, NOT_COVERED, SAMPLING, UNIT, PrivacyStatement
from dpfix.sampling.inner_loader import inner_loader
from dpfix.sampling.rate import BY_CHANCE, accounted_rate, index_set, sampling_of
from dpfix.scan.arguments import check_delta
from dpfix.training.accounting import accounted_steps
from dpfix.training.epsilon import Accuracy, spent, steps_without_noise
from dpfix.training.releases import book_of, settled


class PrivateTraining(tuple[Any, ...]):
    """What the call returns: unpacks to ``(model, optimizer, data_loader)`` like Opacus's tuple.

    Attributes:
        privacy_engine: the engine whose accountant counts the steps.
    """

    privacy_engine: PrivacyEngine
    _report: Report

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
        self._report, self.privacy_engine = report, privacy_engine
        return self

    def with_objects(self, *items: Any) -> PrivateTraining:
        """The same training with other objects in the tuple.

        Args:
            *items: model, optimizer and loader, or wrappers of them.

        Returns:
            The tuple with its attributes.
        """
        return PrivateTraining(items, self._report, self.privacy_engine)

    @property
    def report(self) -> Report:
        """What was found, changed and chosen; where the first real step decides, complete after it."""
        calls = self[1].__dict__.get("real_calls")
        return self._report if calls is None or calls.report is None else calls.report

    @property
    def plan(self) -> Plan:
        """How the model is being trained; a no-grad region that gradient has reached is no longer in it."""
        return self[1].guard.plan

    def get_epsilon(
        self, delta: float, *, alphas: Any = None, eps_error: float | None = None, delta_error: float | None = None
    ) -> float:
        """Privacy loss of the steps made so far.

        Where the engine's accountant cannot answer in seconds (tiny noise, very many steps), Renyi accounting bounds the same
        steps, with a warning.

        Args:
            delta: probability in (0, 1) that the bound does not hold; smaller than 1 / number of samples.
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
        samples = len(index_set(inner_loader(self[-1])))
        if delta >= 1 / samples:
            warn_user(
                f"delta={delta:g} is not smaller than 1 / number of samples = {1 / samples:.2g}: publishing one random sample "
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
        samples = len(index_set(loader))
        cautions = []
        if delta >= 1 / samples:
            cautions.append(f"delta is not below 1 / samples = {1 / samples:.2g}; such a bound means little")
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
            unit=UNIT,
            adjacency=ADJACENCY,
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
            budget="" if spender is None else spender.cited(),
        )

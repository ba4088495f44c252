"""The accountant counts every release once, whatever the script attaches to the optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from opacus.optimizers import DPOptimizer

from dpfix.errors import MisuseError
from dpfix.scan.arguments import check_delta, check_names
from dpfix.training.epsilon import ACCURACY, Accuracy, spent

StepHook = Callable[[DPOptimizer], None]


class Accounting:
    """Counts every release once, also if the script attaches the accountant's hook again or replaces it.

    Costs one call per step.

    Args:
        optimizer: the private optimizer, with the accountant's step hook.
        accountant: Opacus's accountant.
    """

    def __init__(self, optimizer: DPOptimizer, accountant: Any) -> None:
        self._accountant = accountant
        self._account: StepHook = optimizer.step_hook  # type: ignore[assignment]
        self._counted = False
        optimizer.step_hook = self.count

    def new_step(self) -> None:
        """The next release is another one."""
        self._counted = False

    def count(self, optimizer: DPOptimizer) -> None:
        """A batch is released.

        Raises:
            MisuseError: the accountant cannot count it.
        """
        if self._counted:
            return
        self._counted = True
        last = self._accountant.history[-1:]
        try:
            self._account(optimizer)
        except ValueError as error:
            if last and self._accountant.history[-1:] != last:  # gdp forgets what it counted before it fails
                self._accountant.history.extend(last)
            raise MisuseError(
                f"the {self._accountant.mechanism()} accountant cannot count this step, with "
                f"noise_multiplier={optimizer.noise_multiplier}: {error}",
                "What it cannot count would be missing in epsilon.",
                "Keep noise and sampling rate as they are, or use SafePrivacyEngine(accountant='prv').",
                path="privacy_engine",
            ) from error

    def before(self, hook: StepHook) -> StepHook:
        """A step hook that counts the step, and then does what the script wants; Opacus's optimizers keep one hook only."""

        def both(optimizer: DPOptimizer) -> None:
            self.count(optimizer)
            hook(optimizer)

        return both

    @property
    def steps(self) -> int:
        """Steps that the accountant has counted."""
        return accounted_steps(self._accountant)


def answer_of(privacy_engine: Any, delta: float, **accuracy: Any) -> float:
    """What a privacy engine answers when it is asked for epsilon.

    Args:
        privacy_engine: of Opacus.
        delta: see :meth:`dpfix.PrivateTraining.get_epsilon`.
        **accuracy: ``alphas``, ``eps_error`` and ``delta_error``; see there.

    Returns:
        Epsilon.
    """
    delta = check_delta(delta)
    check_names(accuracy, ACCURACY, ("delta",))
    return spent(privacy_engine.accountant, delta, Accuracy.of(delta, **accuracy)).epsilon


def accounted_steps(accountant: Any) -> int:
    """Steps in the history of one of Opacus's accountants."""
    return sum(entry[-1] for entry in accountant.history)

"""A budget that lasts longer than a run: one file for a data set, in which every training writes what it releases.

How a training writes is :mod:`dpfix.training.spender`.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace
from typing import Any

from dpfix.errors import ArgumentError, BudgetError
from dpfix.scan.arguments import check_choice, check_delta
from dpfix.scan.values import number, number_in, shown
from dpfix.training.budget_file import ACCOUNTANTS, BudgetFile, Content, counted, gone
from dpfix.training.epsilon import SMALLEST_NOISE, Accuracy, Entry, answer, renyi_epsilon
from dpfix.training.pld_accountant import new_accountant

_HELP = "It is what all trainings on the data together may spend; 8.0, say."

OPEN: list[Any] = []
"""Trainings of this process that may have something reserved, and those of a process that this one was forked from."""


class Budget:
    """The privacy budget of one data set, in a file that all trainings on it share.

    Pass it as ``budget=`` to every call that trains on the data: runs that choose hyper-parameters, folds, resumed runs, rounds
    of federated training, in one process or in several at the same time. A step that would go beyond it is refused, with
    nothing released.

    Args:
        path: of the file; made if there is none.
        epsilon: the budget; needed for a new file. That of an existing file stays as it is.
        delta: its delta, smaller than 1 / number of samples; needed for a new file.
        accountant: ``"prv"`` if not given, ``"rdp"`` or, with ``dpfix[accounting]``, ``"pld"``; composes the releases.
        samples: number of all records, where trainings use parts of them as data sets of their own (folds of files, say).
            Without it, the data set of every training has to have as many records as that of the first one.

    Raises:
        BudgetError: the file cannot be used, or is that of another budget.
        ArgumentError: an argument cannot be used, or is missing.

    >>> import tempfile, os
    >>> path = os.path.join(tempfile.mkdtemp(), "data.budget.json")
    >>> budget = Budget(path, epsilon=8.0, delta=1e-6)
    >>> budget.spent(), budget.remaining
    (0.0, 8.0)
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        epsilon: float | None = None,
        delta: float | None = None,
        accountant: str | None = None,
        samples: int | None = None,
    ) -> None:
        if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
            raise ArgumentError(f"path={shown(path)} is no file name.", help="Pass 'data.budget.json'.", path="path")
        if accountant is not None:
            check_choice("accountant", accountant, ACCOUNTANTS, "Leave it out: 'prv' is the default.")
        given: dict[str, Any] = {
            "epsilon": None if epsilon is None else number_in("epsilon", epsilon, (0, math.inf), _HELP, open_at="low"),
            "delta": None if delta is None else check_delta(delta),
            "accountant": accountant,
        }
        new_accountant(accountant or "prv")  # says what is missing
        self._file = BudgetFile(path)
        self._file.tidy()
        content = self._file.read()
        if content is None:
            if epsilon is None or delta is None:
                raise ArgumentError(
                    f"path={str(path)!r}: there is no such file, and a new budget needs epsilon and delta.",
                    help="Pass for example epsilon=8.0, delta=1e-6, or the path of the file that there is.",
                    path="path",
                )
            made = Content(given["epsilon"], given["delta"], accountant or "prv")
            content = (
                self._file.update(lambda now: made if now is None else None) or made
            )  # another may have been faster
        for name, value in given.items():
            if value is not None and value != getattr(content, name):
                raise BudgetError(
                    f"{name}={value} with {self._file.path.name}, whose {name} is {getattr(content, name)}.",
                    "A budget that a call could change would be none.",
                    f"Leave {name} out, or name another file.",
                    path=name,
                )
        if samples is not None:
            self._allow_parts(samples, content)
        self._account = Account(self._file, content)

    def _allow_parts(self, samples: Any, content: Content) -> None:
        found = number(samples)
        if found is None or found != int(found) or found < (content.samples or 1):
            raise ArgumentError(
                f"samples={shown(samples)} is not a whole number from {content.samples or 1}.",
                "It is the number of all records, of which every training uses some.",
                "Leave it out where all trainings use the same data set.",
                path="samples",
            )
        if (content.samples, content.parts) != (int(found), True):
            self._file.update(lambda now: replace(now or content, samples=int(found), parts=True))

    @property
    def path(self) -> str:
        """The file."""
        return str(self._file.path)

    @property
    def epsilon(self) -> float:
        """The budget."""
        return self._account.epsilon

    @property
    def delta(self) -> float:
        """Its delta."""
        return self._account.delta

    @property
    def accountant(self) -> str:
        """The name of what composes the releases."""
        return self._account.accountant

    def spent(self) -> float:
        """Epsilon of everything in the file, at :attr:`delta`.

        Of other processes' trainings that go on, or were killed, what they have reserved counts.

        Returns:
            Epsilon, at least 0.
        """
        return self._account.loss(self._account.read().history)

    @property
    def remaining(self) -> float:
        """What is left; releases compose to less than the sum of their epsilons, so that more fits than this alone says."""
        return max(0.0, self.epsilon - self.spent())

    def __repr__(self) -> str:
        return f"Budget({self.path!r}, epsilon={self.epsilon:g}, delta={self.delta:g})"

    def __str__(self) -> str:
        content = self._account.read()
        lines = [
            f"budget of {'no training yet' if content.samples is None else f'{content.samples} samples'}: epsilon "
            f"{self.epsilon:g} at delta {self.delta:g}, accountant {self.accountant}",
            f"{'':>4s} {'begun':25s} {'model':20s} {'steps':>8s} {'reserved':>8s} {'noise':>13s} {'rate':>9s}",
        ]
        for place, line in enumerate(content.trainings.values(), 1):
            noises, rates = [noise for noise, *_ in line.entries], [rate for _, rate, _ in line.entries]
            low, high = min(noises, default=0.0), max(noises, default=0.0)
            ahead = 0 if line.ahead is None else line.ahead[-1]
            noise = f"{low:.4g}" if low == high else f"{low:.4g}-{high:.4g}"
            lines.append(
                f"{place:4d} {line.begun:25s} {line.model[:20]:20s} {line.steps - ahead:8d} {ahead:8d} {noise:>13s} "
                f"{max(rates, default=0.0):9.3g}"
            )
        spent = self._account.loss(content.history)
        lines.append(f"spent: epsilon {spent:.4g} of {self.epsilon:g}; {max(0.0, self.epsilon - spent):.4g} remain")
        if content.samples is not None and self.delta >= 1 / content.samples:
            lines.append(f"delta is not below 1 / samples = {1 / content.samples:.2g}; such a budget means little")
        return "\n".join(lines)


class Account:
    """The file of a budget as trainings use it: what counts, and what fits.

    Args:
        file: of the budget.
        limits: the budget, its delta and its accountant, which do not change.

    Attributes:
        writes: how often the file had been written when it was last seen.
    """

    def __init__(self, file: BudgetFile, limits: Content) -> None:
        self.file, self.epsilon, self.delta, self.accountant = file, limits.epsilon, limits.delta, limits.accountant
        self.writes = limits.writes

    def read(self) -> Content:
        """The content of the file; of this process's own trainings, what they have really released.

        Returns:
            The content.

        Raises:
            BudgetError: the file cannot be used.
        """
        writes = self.writes  # another thread may write while this one reads
        content = self.goes_on(self.file.read(), writes)
        self.writes = max(self.writes, content.writes)
        return content.with_lines({s.name: s.line() for s in self.own() if s.name in content.trainings})

    def goes_on(self, content: Content | None, writes: int) -> Content:
        """The content, if it is one that comes after what was seen before.

        Args:
            content: of the file.
            writes: how often it had been written then.

        Returns:
            The content.

        Raises:
            BudgetError: the file is gone, an earlier copy of itself, or another one.
        """
        limits = self.epsilon, self.delta, self.accountant
        if content is None or content.writes < writes or limits != (content.epsilon, content.delta, content.accountant):
            raise BudgetError(*gone(self.file.path.name), path="budget")
        return content

    def own(self) -> list[Any]:
        """This process's trainings that have written into the file and may have something reserved."""
        return [s for s in tuple(OPEN) if s.process == os.getpid() and s.account.file.path == self.file.path]

    def loss(self, history: list[Entry]) -> float:
        """Epsilon of a history: the smaller one of two upper bounds."""
        if not history:
            return 0.0
        if not all(noise >= SMALLEST_NOISE for noise, *_ in history):
            return math.inf
        accountant = new_accountant(self.accountant)
        accountant.history = history
        found, *_ = answer(accountant, self.delta, Accuracy())
        return min(found.epsilon, renyi_epsilon(history, self.delta))

    def allows(self, history: list[Entry]) -> bool:
        """Whether a history stays within the budget; Renyi accounting is quick, and is asked first."""
        if not all(noise >= SMALLEST_NOISE for noise, *_ in history):
            return False
        return renyi_epsilon(history, self.delta) <= self.epsilon or self.loss(history) <= self.epsilon

    def room(self, history: list[Entry], setting: tuple[float, float], least: int, most: int) -> int:
        """How many more releases are within the budget.

        Args:
            history: of what counts already.
            setting: noise multiplier and rate of the releases.
            least: fewer are of no use.
            most: more are not asked for.

        Returns:
            Their number; 0 if they are fewer than ``least``.
        """

        def fit(steps: int) -> bool:
            return self.allows(counted([*history, (*setting, steps)]))

        if fit(most):
            return most
        if most == least or not fit(least):
            return 0
        while most - least > 1:
            middle = (least + most) // 2
            least, most = (middle, most) if fit(middle) else (least, middle)
        return least

    def refusal(self, content: Content, setting: tuple[float, float], steps: int, what: str) -> BudgetError:
        """That releases go beyond the budget.

        Args:
            content: of the file.
            setting: their noise multiplier and rate.
            steps: their number.
            what: they are.

        Returns:
            The error, with the numbers.
        """
        spent, then = self.loss(content.history), self.loss(counted([*content.history, (*setting, steps)]))
        ahead = [line.ahead[-1] for line in content.trainings.values() if line.ahead is not None and line.ahead[-1]]
        held = (
            f" {sum(ahead)} of the steps in it are reserved by {len(ahead)} training(s) that go on or were killed; those that go "
            "on give back what they do not use."
            if ahead
            else ""
        )
        return BudgetError(
            f"the budget in {self.file.path.name} does not allow {what}: epsilon is {spent:.4g} of {self.epsilon:g} at delta "
            f"{self.delta:g} after {len(content.trainings)} training(s), and would be {then:.4g}.",
            f"What is released adds up over all trainings on the same data.{held}",
            f"Nothing was released, and the model is as it was. Stop here, or train with more noise (it was {setting[0]:.4g}), "
            "fewer steps or smaller batches: make_private_safe_with_epsilon(budget=...) finds the noise.",
            path="budget",
        )

"""Privacy settings of a training with nnU-Net, from the environment or the plans."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dpfix.errors import ArgumentError, UnknownArgumentError
from dpfix.training.budget import Budget

PREFIX = "DPFIX_NNUNET_"
"""``DPFIX_NNUNET_TARGET_EPSILON=8`` sets ``target_epsilon``."""

_WHOLE = ("patches", "patients", "epochs", "iterations")


@dataclass(frozen=True)
class Settings:
    """What is to be guaranteed, and how patients are drawn.

    Attributes:
        target_epsilon: budget of the whole training; this or ``noise_multiplier`` has to be given.
        delta: delta of the budget; one tenth of 1 / patients if not given.
        noise_multiplier: standard deviation of the noise as a multiple of the clip norm.
        max_grad_norm: clip norm of a patient's gradient.
        patches: patches of a patient per step, averaged before clipping.
        patients: expected number of patients per step; the plans' batch size if not given.
        epochs: epochs of nnU-Net; the trainer's own number if not given.
        iterations: steps per epoch; the trainer's own number if not given.
        accountant: ``"prv"`` or ``"rdp"``.
        patient_pattern: regular expression whose first group names the patient in a case's name, for data sets with
            several cases per patient; every case is a patient if not given.
        budget: file of the budget that all trainings on the data share (:class:`dpfix.Budget`), which there has to be already.
    """

    target_epsilon: float | None = None
    delta: float | None = None
    noise_multiplier: float | None = None
    max_grad_norm: float = 1.0
    patches: int = 2
    patients: int | None = None
    epochs: int | None = None
    iterations: int | None = None
    accountant: str = "prv"
    patient_pattern: str | None = None
    budget: str | None = None

    def shared_budget(self) -> Budget | None:
        """The budget that all trainings on the data share.

        Returns:
            It; ``None`` where there is none.

        Raises:
            ArgumentError: there is no such file.
            BudgetError: it cannot be used.
        """
        if self.budget is None:
            return None
        if not Path(self.budget).is_file():
            raise ArgumentError(
                f"nnU-Net: budget={self.budget!r} is no file.",
                "Every fold is a training on the same patients, and all share one file.",
                "Make it once, with the number of patients of all folds: dpfix.Budget('data.budget.json', epsilon=8.0, "
                "delta=1e-4, samples=300).",
                path="budget",
            )
        return Budget(self.budget)

    def check_budget(self) -> None:
        """A training needs a budget, one of the two ways.

        Raises:
            ArgumentError: neither a target epsilon nor a noise multiplier is set, or both are; or the file of the budget that
                is shared does not exist.
            BudgetError: that file cannot be used.
        """
        if (self.target_epsilon is None) == (self.noise_multiplier is None):
            raise ArgumentError(
                f"nnU-Net: target_epsilon={self.target_epsilon} and noise_multiplier={self.noise_multiplier}; exactly one of "
                "them has to be set.",
                help=f"Set {PREFIX}TARGET_EPSILON=8 for a budget, or {PREFIX}NOISE_MULTIPLIER.",
                path="target_epsilon",
            )
        self.shared_budget()

    def patient_of(self, case: str) -> str:
        """The patient that a case belongs to.

        Args:
            case: name of the case.

        Returns:
            Name of the patient.

        Raises:
            ArgumentError: the pattern does not match.
        """
        if self.patient_pattern is None:
            return case
        found = re.search(self.patient_pattern, case)
        if found is None or not found.groups():
            raise ArgumentError(
                f"nnU-Net: patient_pattern={self.patient_pattern!r} finds no patient in the case {case!r}.",
                help="It needs one group that matches the patient's name, for example '^(.*)_visit'.",
                path="patient_pattern",
            )
        return found[1]


def read_settings(environment: Mapping[str, str], *plans: Mapping[str, Any]) -> Settings:
    """Read the settings.

    Args:
        environment: environment variables; they win over the plans.
        *plans: mappings that may have settings under ``"dpfix"``; later ones win over earlier ones.

    Returns:
        The settings, checked one by one.

    Raises:
        UnknownArgumentError: a setting does not exist.
        ArgumentError: a value cannot be used.
    """
    given: dict[str, Any] = {}
    for one in plans:
        given |= one.get("dpfix") or {}
    given |= {k.removeprefix(PREFIX).lower(): v for k, v in environment.items() if k.startswith(PREFIX)}
    known = {field.name: field.default for field in fields(Settings)}
    for name, value in given.items():
        if name not in known:
            nearest = difflib.get_close_matches(name, known, 1)
            raise UnknownArgumentError(
                f"nnU-Net: there is no setting {name!r}; there are {', '.join(known)}.",
                help=f"Did you mean {nearest[0]!r}?" if nearest else "",
                path=name,
            )
        given[name] = _value(name, value)
    return Settings(**given)


def _value(name: str, value: Any) -> Any:
    if value is None or name in ("patient_pattern", "budget"):
        return value
    if name == "accountant":
        if value not in ("prv", "rdp"):
            raise ArgumentError(f"nnU-Net: accountant={value!r} is neither 'prv' nor 'rdp'.", path="accountant")
        return value
    try:
        number = int(value) if name in _WHOLE else float(value)
    except ValueError:
        number = -1
    zero_is_legal = name == "noise_multiplier"
    if not (number > 0 or (zero_is_legal and number == 0)) or number == float("inf"):
        kind = "whole number" if name in _WHOLE else "number"
        raise ArgumentError(f"nnU-Net: {name}={value!r} is no positive {kind}.", path=name)
    return number

"""What a rule is, and how rules get their numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from dpfix.errors import DPFixError, ModelError
from dpfix.instrument.rng import rng_untouched
from dpfix.report.codes import CODES, RETIRED
from dpfix.report.finding import Finding, Fixability, Severity
from dpfix.scan.scan import Scan

Cases = tuple[Callable[[], dict[str, Any]], ...]
"""Factories of keyword arguments for the call."""


@dataclass(frozen=True)
class Precision:
    """A repair that gives parameters another type, and their model a class that computes as before.

    Export takes it back.

    Attributes:
        cls: the class that the model gets.
        parameters: stay the same objects.
        dtype: the type that they get, with their gradients and what the optimizer holds of them.
    """

    cls: type[nn.Module]
    parameters: tuple[nn.Parameter, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Rule(ABC):
    """What is looked for in model, optimizer and data loader before anything is run.

    A rule is a subclass in a file of its own. Its docstring is its page in the documentation: one sentence, then
    paragraphs that begin with ``What:``, ``Why:`` or ``Why bad:``, ``Example:`` and ``Use instead:``.

    Attributes:
        code: stable code of its findings.
        title: what is found, in a few words.
        error: the exception that its refusals raise.
        severity: effect of its findings on the guarantee; where nothing has to be done, it is advice.
        sets_attributes: whether its fixes leave layers and parameters what they are.
        outcomes: every fixability that its findings may have, each with what the page says about it.
        VALID: calls that the rule leaves alone. Tests and the page are made of them.
        INVALID: calls in which it finds something; together with ``VALID`` they show every outcome.
        remark: why ``INVALID`` is empty, if it is.
    """

    code: str

    title: ClassVar[str]
    error: ClassVar[type[DPFixError]] = ModelError
    severity: ClassVar[Severity]
    sets_attributes: ClassVar[bool] = False
    outcomes: ClassVar[Mapping[Fixability, str]] = {Fixability.REFUSED: "not fixed."}
    VALID: ClassVar[Cases]
    INVALID: ClassVar[Cases] = ()
    remark: ClassVar[str] = ""

    @abstractmethod
    def find(self, scan: Scan) -> Iterator[Finding]:
        """Look, and change nothing.

        Args:
            scan: the objects of the call.

        Yields:
            What was found, made by :meth:`finding` or :meth:`refusal`.
        """

    def fix(self, module: nn.Module, scan: Scan) -> nn.Module | Mapping[str, Any] | Precision:
        """The repair of one finding; :mod:`dpfix.repair.surgery` carries it out.

        Args:
            module: the module at the finding's path.
            scan: the objects of the call.

        Returns:
            A replacement for the module, values of attributes to set on it, or another precision.
        """
        raise NotImplementedError(f"{type(self).__name__} declares a repair and has none")

    def finding(
        self, outcome: Fixability, fact: str, why: str, *, fix: str = "", help: str = "", path: str = ""
    ) -> Finding:
        """A finding with one of the declared outcomes.

        Args:
            outcome: what can be done; one of ``outcomes``.
            fact: see :class:`~dpfix.report.finding.Finding`, also for the other fields.

        Returns:
            The finding.

        Raises:
            ValueError: the rule does not declare this outcome.
        """
        if outcome not in self.outcomes:
            raise ValueError(f"{type(self).__name__}.outcomes does not declare {outcome.value!r}, and a finding has it")
        severity = Severity.ADVICE if outcome is Fixability.NOTHING else self.severity
        return Finding(self.code, severity, outcome, fact, why, fix, help, path)

    def refusal(self, fact: str, why: str, help: str, path: str = "") -> Finding:
        """A finding that stops the call."""
        return self.finding(Fixability.REFUSED, fact, why, help=help, path=path)


def numbered(**rules: type[Rule]) -> tuple[Rule, ...]:
    """Rules with their codes. Python refuses a keyword that is given twice, so no two rules share a number.

    Args:
        **rules: classes of rules by code.

    Returns:
        The rules, in the order given.

    Raises:
        ValueError: a code belongs to a check, to a class of errors, or to what was retired.
    """
    for code in rules:
        taken = CODES.get(code) or RETIRED.get(code)
        if taken:
            raise ValueError(f"{code} is taken: {taken}. docs/codes.md names the next free number.")
    return tuple(rule(code) for code, rule in rules.items())


def run_rules(scan: Scan, rules: Iterable[Rule]) -> tuple[tuple[Rule, Finding], ...]:
    """Ask every rule what it finds; whatever a rule draws, the script's generators stay where they were.

    Returns:
        ``(rule, finding)`` pairs in the order of the rules.
    """
    with rng_untouched():
        return tuple((rule, finding) for rule in rules for finding in rule.find(scan))

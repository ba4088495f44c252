"""The only code that changes a model or an optimizer: all or nothing, every alias, counted afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from dpfix.errors import ModelError, OptimizerError
from dpfix.instrument.memento import Memento
from dpfix.instrument.rng import rng_untouched
from dpfix.report.finding import Finding, Fixability
from dpfix.rules.rule import Precision, Rule, run_rules
from dpfix.scan.scan import Scan
from dpfix.weights import origins


class Surgery:
    """A transaction over one model and its optimizer.

    Used as a context manager: leaving it by an exception, or without :meth:`commit`, undoes every change.
    """

    def __init__(self, scan: Scan) -> None:
        self.scan = scan
        self._before = Memento(scan.module, scan.optimizer, *origins.REMEMBERED, values=False)
        self._committed = False

    def __enter__(self) -> Surgery:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._committed:
            self._before.put_back()

    def commit(self) -> None:
        """Keep the changes."""
        self._committed = True

    def repair(self, found: tuple[tuple[Rule, Finding], ...]) -> None:
        """Apply the fix of every finding that has one, then count.

        Raises:
            ModelError: a rule still finds what it claims to have fixed.
        """
        changes = (Fixability.EXACT, Fixability.CHANGES_MODEL)
        fixed = [(rule, finding) for rule, finding in found if finding.fixability in changes]
        for rule, finding in fixed:
            module = self.scan.module.get_submodule(finding.path)
            with rng_untouched():
                result = rule.fix(module, self.scan)
            exact = finding.fixability is Fixability.EXACT
            if isinstance(result, nn.Module):
                self.replace(module, result)
                origins.remember_replaced(module, result, result._get_name(), exact)
            elif isinstance(result, Precision):
                origins.remember_attributes(module, {"__class__": type(module)}, finding.fix, exact, taken_back=True)
                self.set_attributes(module, {"__class__": result.cls})
                for parameter in result.parameters:
                    self.convert(parameter, result.dtype)
            else:
                before = {name: getattr(module, name) for name in result}
                self.set_attributes(module, result)
                origins.remember_attributes(module, before, finding.fix, exact)
        for rule, left in run_rules(replace(self.scan), dict.fromkeys(rule for rule, _ in fixed)):
            if left.fixability in changes:
                raise ModelError(
                    f"{left.fact} The repair of {rule.code} did not take hold; the model was left as it was.",
                    help="This is a defect of dpfix: please report it with the model's class.",
                    path=left.path,
                )

    def replace(self, old: nn.Module, new: nn.Module) -> None:
        """Put one module in the place of another, under every name the old one has.

        Args:
            old: a module of the model, not the root.
            new: its replacement; parameters that are new to the model enter the optimizer in place of the old
                ones of the same position.

        Raises:
            ModelError: the module is the root, whose owner is not known here.
        """
        if old is self.scan.module:
            raise ModelError(
                f"{self.scan.place('')} is itself what has to be replaced,",
                "and dpfix cannot put another object into your variable.",
                "Wrap it: module = torch.nn.Sequential(module), and build the optimizer from it.",
                path="module",
            )
        new.train(old.training)
        for owner in list(self.scan.aliases):
            for name, child in list(owner._modules.items()):
                if child is old:
                    owner._modules[name] = new
        gone = [p for p in old.parameters() if all(p is not q for q in new.parameters())]
        added = [p for p in new.parameters() if all(p is not q for q in old.parameters())]
        if gone or added:
            self._follow(gone, added, type(old).__name__)

    def _follow(self, gone: list[nn.Parameter], added: list[nn.Parameter], name: str) -> None:
        optimizer: Optimizer = self.scan.optimizer
        if any(p in optimizer.state for p in gone):
            raise OptimizerError(
                f"optimizer already holds state for the parameters of a {name} whose replacement has other parameters,",
                "and that state cannot be carried over.",
                "Call make_private_safe before the first step, or leave grad_sample_mode at 'auto' (dpfix's engines keep the "
                "layer as it is).",
                path="optimizer",
            )
        groups = [g for g in optimizer.param_groups if any(p is q for p in gone for q in g["params"])]
        if not groups:
            return
        for group in optimizer.param_groups:
            group["params"][:] = [p for p in group["params"] if all(p is not q for q in gone)]
        groups[0]["params"].extend(added)

    def set_attributes(self, module: nn.Module, values: Mapping[str, Any]) -> None:
        """Set plain attributes of a module of the model, by name."""
        for name, value in values.items():
            setattr(module, name, value)

    def convert(self, parameter: nn.Parameter, dtype: torch.dtype) -> None:
        """Give a parameter of the model another type, with its gradient and what the optimizer holds of it."""
        origins.remember_dtype(parameter)
        grad, before = parameter.grad, parameter.dtype
        parameter.data = parameter.data.to(dtype)
        parameter.grad = None if grad is None else grad.to(dtype)
        held = self.scan.optimizer.state.get(parameter, {})
        for name, value in held.items():
            if isinstance(value, torch.Tensor) and value.dtype is before:
                held[name] = value.to(dtype)

    def freeze(self, parameter: nn.Parameter) -> None:
        """Stop training a parameter of the model that no gradient reaches."""
        parameter.requires_grad_(False)
        origins.remember_frozen(parameter)

"""Opacus's ``"ew"`` mode: torch's expanded weights, asked for by name only."""

from __future__ import annotations

from typing import Any

from opacus.grad_sample.gsm_exp_weights import GradSampleModuleExpandedWeights
from opacus.validators import ModuleValidator
from torch import nn
from typing_extensions import override

from dpfix.engines.base import Engine, Verdict
from dpfix.engines.opacus.no_op import ByHandHandle
from dpfix.plan import Plan


class ExpandedWeights(Engine):
    """The engine."""

    name = opacus_mode = "ew"
    owns_gradients = False
    needs_wrapper = True

    @override
    def supports(self, module: nn.Module, record: Any) -> Verdict:
        """Where Opacus's validator says so; whether the sums are right is for the audit to say."""
        if record.rows_per_sample > 1 or record.counts:
            return Verdict("samples have several rows")
        errors = ModuleValidator.validate(module, strict=False)
        return Verdict(f"Opacus refuses the model: {str(errors[0])[:120]}" if errors else "")

    @override
    def attach(self, module: nn.Module, plan: Plan, prepared: Any = None) -> ByHandHandle:
        """Wrap the model; autograd then leaves per-sample gradients on ``grad_sample`` by itself."""
        if prepared is None:
            prepared = GradSampleModuleExpandedWeights(module, loss_reduction=plan.loss_reduction)
        return ByHandHandle(prepared)

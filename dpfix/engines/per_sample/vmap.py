"""The whole model under ``vmap``, behind an ordinary ``loss.backward()``.

Every trainable parameter becomes one leaf of shape ``[samples, *parameter]`` (an expanded view: no copy), and the
model's forward runs for all samples at once. Right for whatever ``vmap`` can follow, including double backward
passes; the per-sample gradients of all parameters are kept until the step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from typing_extensions import override

from dpfix.engines.base import Engine, Verdict, batches_of_tensors, per_sample
from dpfix.engines.functional.call import MappedCall
from dpfix.engines.functional.parameter_swap import Aliases
from dpfix.engines.per_sample.handle import AliasHandle
from dpfix.errors import PlanBrokenError
from dpfix.layout.calls import CallLayout
from dpfix.plan import Plan, switched_on


class Vmap(Engine):
    """The engine."""

    name = "vmap"
    opacus_mode = "no_op"

    @override
    def supports(self, module: nn.Module, record: Any) -> Verdict:
        return batches_of_tensors(record)

    @override
    def attach(self, module: nn.Module, plan: Plan, prepared: Any = None) -> VmapHandle:
        return VmapHandle(module, plan)


class VmapHandle(AliasHandle):
    """The engine at work on one model."""

    def __init__(self, module: nn.Module, plan: Plan) -> None:
        super().__init__(module, plan)
        self._mapped = MappedCall(self.original, self.slots, workarounds=plan.help_vmap)

    @override
    def aliases_for(self, samples: int) -> list[Aliases]:
        return [{n: p.detach().expand(samples, *p.shape).requires_grad_() for n, p in self._parameters.items()}]

    @override
    def run(self, layout: CallLayout, args: Any, kwargs: Any, samples: int, aliases: list[Aliases]) -> Any:
        for path in self.plan.fixed_norms:
            if self.model.get_submodule(path).training:
                raise PlanBrokenError(*switched_on(self.model, path), path=path)
        return self._mapped(aliases[0], layout, samples, self.weight(samples), args, kwargs)

    @override
    def fill(self, out: torch.Tensor, aliases: list[Aliases], name: str, scale: float | torch.Tensor) -> None:
        grad = aliases[0][name].grad
        if grad is not None:
            torch.mul(grad, per_sample(scale, grad), out=out)

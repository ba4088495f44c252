"""The whole model under ``vmap``, behind an ordinary ``loss.backward()``.

Every trainable parameter becomes one leaf of shape ``[samples, *parameter]`` (an expanded view: no copy), and the
model's forward runs for all samples at once. Right for whatever ``vmap`` can follow, including double backward
passes; the per-sample gradients of all parameters are kept until the step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dpfix.engines.base import Engine, Verdict, per_sample
from dpfix.engines.functional.call import call_mapped
from dpfix.engines.functional.parameter_swap import Aliases
from dpfix.engines.per_sample.handle import AliasHandle
from dpfix.errors import PlanBrokenError
from dpfix.layout.calls import CallLayout
from dpfix.plan import Plan, switched_on


class Vmap(Engine):
    """The engine."""

    name = "vmap"
    opacus_mode = "no_op"

    def supports(self, module: nn.Module, record: Any) -> Verdict:
        """Works wherever the probe showed which rows belong to which sample, and ``vmap`` can follow.

        Args:
            module: the repaired model.
            record: what the probe showed.

        Returns:
            The verdict.
        """
        lists = any(call.lists for call in record.calls)
        return Verdict(record.layout_problem or ("the model takes a list of samples" if lists else ""))

    def attach(self, module: nn.Module, plan: Plan, prepared: Any = None) -> VmapHandle:
        """Put a forward under ``vmap`` in the place of the module's own.

        Args:
            module: the repaired model.
            plan: how the calls carry their samples.
            prepared: not used; Opacus prepares nothing for this engine.

        Returns:
            The handle.
        """
        return VmapHandle(module, plan)


class VmapHandle(AliasHandle):
    """The engine at work on one model."""

    def aliases_for(self, samples: int) -> list[Aliases]:
        """See :class:`AliasHandle`.

        Args:
            samples: number of samples.

        Returns:
            One set with a leading sample dimension.
        """
        return [{n: p.detach().expand(samples, *p.shape).requires_grad_() for n, p in self._parameters.items()}]

    def run(self, layout: CallLayout, args: Any, kwargs: Any, samples: int, aliases: list[Aliases]) -> Any:
        """See :class:`AliasHandle`: all samples at once.

        Args:
            layout: how the call carries its samples.
            args: positional arguments.
            kwargs: keyword arguments.
            samples: number of samples.
            aliases: the aliases.

        Returns:
            The model's output for the whole batch.

        Raises:
            PlanBrokenError: a normalisation that was audited in evaluation mode is in training mode now.
        """
        for path in self.plan.fixed_norms:
            if self.model.get_submodule(path).training:
                raise PlanBrokenError(*switched_on(self.model, path), path=path)
        return call_mapped(
            self.original, self.slots, aliases[0], layout.inputs, layout.output, samples,
            self.weight(samples), args, kwargs, helped=self.plan.help_vmap,
        )  # fmt: skip

    def fill(self, out: torch.Tensor, aliases: list[Aliases], name: str, scale: float | torch.Tensor) -> None:
        """See :class:`AliasHandle`.

        Args:
            out: zeros, shape ``[samples, *parameter]``.
            aliases: the aliases.
            name: name of the parameter.
            scale: what gradients are multiplied with.
        """
        grad = aliases[0][name].grad
        if grad is not None:
            torch.mul(grad, per_sample(scale, grad), out=out)

"""Batches of one behind an ordinary ``loss.backward()``.

In a training forward pass the model runs once per sample, each time with an alias of every parameter that belongs to
that sample; the outputs are joined to the batch the script expects. The script's own ``backward()`` then leaves the
gradient of sample i on alias i, whatever the layers in between do. Slow, and always right: sample i never meets
sample j inside the model.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn

from dpfix import trees
from dpfix.engines.base import Verdict, zeros
from dpfix.engines.parameters import Aliases, parameter_slots, swapped
from dpfix.errors import PlanBrokenError
from dpfix.layout import CallLayout, known_layout, samples_in
from dpfix.plan import Plan


class Microbatch:
    """The engine."""

    name = "microbatch"
    opacus_mode = "no_op"

    def supports(self, module: nn.Module, record: Any) -> Verdict:
        """Works wherever the probe showed which rows belong to which sample.

        Args:
            module: the repaired model.
            record: what the probe showed.

        Returns:
            The verdict.
        """
        return Verdict(record.layout_problem)

    def attach(self, module: nn.Module, plan: Plan, prepared: Any = None) -> MicrobatchHandle:
        """Put a per-sample forward in the place of the module's own.

        Args:
            module: the repaired model.
            plan: how the calls carry their samples.
            prepared: not used; Opacus prepares nothing for this engine.

        Returns:
            The handle.
        """
        return MicrobatchHandle(module, plan)


class Iteration:
    """The forward calls between two backward passes, and the aliases they share.

    Attributes:
        samples: per-sample aliases of every trainable parameter, by number of samples in the call.
    """

    def __init__(self) -> None:
        self.samples: dict[int, list[Aliases]] = {}

    def reached(self) -> dict[int, list[Aliases]]:
        """The sets of aliases that a gradient has reached."""
        return {
            n: aliases
            for n, aliases in self.samples.items()
            if any(alias.grad is not None for one in aliases for alias in one.values())
        }

    def clear(self) -> None:
        """Drop the gradients, keep the aliases: a graph may still lead to them."""
        for aliases in self.samples.values():
            for one in aliases:
                for alias in one.values():
                    alias.grad = None


class PerSampleForward:
    """Stands in for a module's ``forward``; a deep copy of the module gets its ordinary one back."""

    def __init__(self, handle: MicrobatchHandle) -> None:
        self.handle = handle

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The per-sample forward pass."""
        return self.handle.forward(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo.get(id(self.handle.model))
        return None if copied is None else MethodType(type(copied).forward, copied)


class MicrobatchHandle:
    """The engine at work on one model.

    Args:
        module: the repaired model.
        plan: how its calls carry their samples.
    """

    def __init__(self, module: nn.Module, plan: Plan) -> None:
        self.model = module
        self.plan = plan
        self._original = module.forward
        self._iterations = [Iteration()]
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._slots = parameter_slots(module, self._parameters)
        vars(module)["forward"] = PerSampleForward(self)

    def detach(self) -> None:
        """Give the module its own ``forward`` back."""
        vars(self.model).pop("forward", None)
        self._iterations = [Iteration()]

    def clear(self) -> None:
        """Forget the gradients that have arrived."""
        for iteration in self._iterations:
            iteration.clear()
        del self._iterations[:-1]

    def finish(self) -> None:
        """Forget everything about the step that was made."""
        self._iterations = [Iteration()]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, one sample at a time where gradients are being taken.

        Args:
            *args: the model's arguments.
            **kwargs: the model's keyword arguments.

        Returns:
            The model's output for the whole batch.
        """
        transformed = torch._C._are_functorch_transforms_active()  # type: ignore[attr-defined]
        if not (self.model.training and torch.is_grad_enabled()) or transformed:
            return self._original(*args, **kwargs)
        args, kwargs = trees.plain(args), trees.plain(kwargs)
        layout = known_layout(self.plan.calls, self.model, args, kwargs)
        samples = samples_in(layout, self.model, args, kwargs)
        aliases = self._current(samples)
        outputs = [self._one(layout, args, kwargs, i, samples, aliases[i]) for i in range(samples)]
        return join_outputs(layout, outputs, self.plan.loss_reduction)

    def _current(self, samples: int) -> list[Aliases]:
        """Aliases for this call; a call after a backward pass starts a new iteration."""
        if self._iterations[-1].reached():
            self._iterations.append(Iteration())
        sets = self._iterations[-1].samples
        if samples not in sets:
            sets[samples] = [
                {name: p.detach().requires_grad_() for name, p in self._parameters.items()} for _ in range(samples)
            ]
        return sets[samples]

    def _one(self, layout: CallLayout, args: Any, kwargs: Any, i: int, samples: int, aliases: Aliases) -> Any:
        dims = dict(layout.inputs)

        def take(path: trees.Path, leaf: Any) -> Any:
            dim = dims.get(path)
            return leaf if dim is None else dim.take(leaf, i, samples)

        one_args, one_kwargs = trees.map_leaves(take, layout.one(args, kwargs, i))
        with swapped(self._slots, aliases):
            return self._original(*one_args, **one_kwargs)

    def collect(self, parameters: list[nn.Parameter]) -> list[int]:
        """Stack the gradients of the aliases.

        Args:
            parameters: the trainable parameters.

        Returns:
            Number of samples of every accumulated iteration.

        Raises:
            PlanBrokenError: calls with different numbers of samples were added up in one backward pass.
        """
        names = {p: name for name, p in self._parameters.items()}
        found: list[list[Aliases]] = []
        for iteration in self._iterations:
            reached = iteration.reached()
            if len(reached) > 1:
                raise PlanBrokenError(
                    f"one backward pass reached calls of {type(self.model).__name__} with different numbers of samples: "
                    f"{sorted(reached)}. Their gradients cannot be added per sample; make the calls with the "
                    "same samples, or make one step for each."
                )
            found += list(reached.values())
        for p in parameters:
            parts = [self._stacked(aliases, names.get(p), p) for aliases in found]
            p.grad_sample = parts[0] if len(parts) == 1 else parts or None  # type: ignore[attr-defined]
        return [len(aliases) for aliases in found]

    def _stacked(self, aliases: list[Aliases], name: str | None, p: nn.Parameter) -> torch.Tensor:
        out = zeros(p, len(aliases))
        if name is None:
            return out
        scale = len(aliases) if self.plan.loss_reduction == "mean" else 1
        for i, one in enumerate(aliases):
            grad = one[name].grad
            if grad is not None:
                torch.mul(grad, scale, out=out[i])
        return out


def join_outputs(layout: CallLayout, outputs: list[Any], loss_reduction: str) -> Any:
    """Put the outputs of single samples together to the output of the batch.

    Args:
        layout: how the output carries the samples.
        outputs: one output per sample.
        loss_reduction: how a scalar per sample (a loss computed by the model) becomes the batch's.

    Returns:
        A tree like each output. Tensors that carry samples are joined; scalars that carry gradient are averaged or
        summed; all else is the first sample's.
    """
    dims = dict(layout.output)
    parts = [dict(trees.leaves(o)) for o in outputs]

    def join(path: trees.Path, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        dim = dims.get(path)
        tensors = [p[path] for p in parts]
        if dim is not None:
            return dim.join(tensors)
        if leaf.requires_grad and leaf.dim() == 0:
            total = torch.stack(tensors).sum()
            return total / len(tensors) if loss_reduction == "mean" else total
        return leaf

    return trees.map_leaves(join, outputs[0])

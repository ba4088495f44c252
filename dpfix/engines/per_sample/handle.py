"""Aliases of the parameters per sample behind an ordinary ``loss.backward()``: what the exact engines share.

In a training forward pass every parameter is replaced by aliases that belong to single samples. The script's own
``backward()`` then leaves the gradient of sample i on alias i, whatever the layers in between do.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn

from dpfix.engines.base import Handle, no_counts, zeros
from dpfix.engines.functional.parameter_swap import Aliases, parameter_slots
from dpfix.errors import PlanBrokenError
from dpfix.instrument import pytree
from dpfix.layout.calls import CallLayout, known_layout, samples_in
from dpfix.plan import Plan


class Iteration:
    """The forward calls between two backward passes, and the aliases they share.

    Attributes:
        samples: aliases of every trainable parameter, by number of samples in the call: one set per sample, or one
            set whose tensors have a leading sample dimension.
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
    """Stands in for a module's ``forward``; a copy of the module, or a pickled one, gets its ordinary one back."""

    def __init__(self, handle: AliasHandle) -> None:
        self.handle = handle

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The per-sample forward pass."""
        return self.handle.forward(*args, **kwargs)

    def __reduce__(self) -> Any:
        return _forward_of, (self.handle.model,)


def _forward_of(model: nn.Module) -> MethodType:
    return MethodType(type(model).forward, model)


class AliasHandle(Handle):
    """An engine of this kind at work on one model.

    Args:
        module: the repaired model.
        plan: how its calls carry their samples.
    """

    def __init__(self, module: nn.Module, plan: Plan) -> None:
        self.model = module
        self.plan = plan
        self.counts: Callable[[], tuple[int, ...]] = no_counts
        self.original = module.forward
        self._iterations = [Iteration()]
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.slots = parameter_slots(module, self._parameters)
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
        """The model's forward, with aliases where gradients are being taken.

        Args:
            *args: the model's arguments.
            **kwargs: the model's keyword arguments.

        Returns:
            The model's output for the whole batch.
        """
        transformed = torch._C._are_functorch_transforms_active()  # type: ignore[attr-defined]
        if not (self.model.training and torch.is_grad_enabled()) or transformed:
            return self.original(*args, **kwargs)
        args, kwargs = pytree.plain(args), pytree.plain(kwargs)
        layout = known_layout(self.plan.calls, self.model, args, kwargs, self.counts())
        samples = samples_in(layout, self.model, args, kwargs)
        return self.run(layout, args, kwargs, samples, self._current(samples))

    def _current(self, samples: int) -> list[Aliases]:
        """Aliases for this call; a call after a backward pass starts a new iteration."""
        if self._iterations[-1].reached():
            self._iterations.append(Iteration())
        sets = self._iterations[-1].samples
        if samples not in sets:
            sets[samples] = self.aliases_for(samples)
        return sets[samples]

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
        found: list[tuple[int, list[Aliases]]] = []
        for iteration in self._iterations:
            reached = iteration.reached()
            if len(reached) > 1:
                raise PlanBrokenError(
                    f"one backward pass reached calls of {type(self.model).__name__} with different numbers of samples: "
                    f"{sorted(reached)}. Their gradients cannot be added per sample; make the calls with the "
                    "same samples, or make one step for each."
                )
            found += reached.items()
        for p in parameters:
            parts = [self._stacked(aliases, names.get(p), p, samples) for samples, aliases in found]
            p.grad_sample = parts[0] if len(parts) == 1 else parts or None  # type: ignore[attr-defined]
        return [samples for samples, _ in found]

    def _stacked(self, aliases: list[Aliases], name: str | None, p: nn.Parameter, samples: int) -> torch.Tensor:
        out = zeros(p, samples)
        if name is not None:
            self.fill(out, aliases, name, self.plan.scale(samples, self.counts()))
        return out

    def weight(self, samples: int) -> float | torch.Tensor:
        """Weight of every sample in the batch's loss.

        Args:
            samples: number of samples.

        Returns:
            One number, or shape ``[samples]``.
        """
        return self.plan.weight(samples, self.counts())

    @abstractmethod
    def aliases_for(self, samples: int) -> list[Aliases]:
        """New aliases of the trainable parameters.

        Args:
            samples: number of samples.

        Returns:
            The aliases.
        """

    @abstractmethod
    def run(self, layout: CallLayout, args: Any, kwargs: Any, samples: int, aliases: list[Aliases]) -> Any:
        """The model's forward with aliases in the place of parameters.

        Args:
            layout: how the call carries its samples.
            args: positional arguments.
            kwargs: keyword arguments.
            samples: number of samples.
            aliases: the aliases.

        Returns:
            The model's output for the whole batch.
        """

    @abstractmethod
    def fill(self, out: torch.Tensor, aliases: list[Aliases], name: str, scale: float | torch.Tensor) -> None:
        """Write per-sample gradients where a gradient arrived.

        Args:
            out: zeros, shape ``[samples, *parameter]``.
            aliases: the aliases.
            name: name of the parameter.
            scale: what gradients are multiplied with: one number, or shape ``[samples]``.
        """

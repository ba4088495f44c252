"""Aliases of the parameters per sample behind an ordinary ``loss.backward()``: what the exact engines share.

In a training forward pass every parameter is replaced by aliases that belong to single samples. The script's own
``backward()`` then leaves the gradient of sample i on alias i, whatever the layers in between do.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from dpfix.engines.base import Handle, no_counts, zeros
from dpfix.engines.functional.parameter_swap import Aliases, parameter_slots
from dpfix.engines.iterations import Iteration, Iterations
from dpfix.engines.replaced import Replaced, is_recorded
from dpfix.instrument import pytree
from dpfix.layout.calls import CallLayout, known_layout, samples_in
from dpfix.plan import Plan


class AliasIteration(Iteration):
    """The aliases that the forward calls between two backward passes share.

    Attributes:
        samples: aliases of every trainable parameter, by number of samples in the call: one set per sample, or one
            set whose tensors have a leading sample dimension.
    """

    def __init__(self) -> None:
        self.samples: dict[int, list[Aliases]] = {}

    @override
    def arrived(self) -> dict[int, list[Aliases]]:
        return {
            n: aliases
            for n, aliases in self.samples.items()
            if any(alias.grad is not None for one in aliases for alias in one.values())
        }

    @property
    @override
    def begun(self) -> bool:
        return bool(self.samples)

    @override
    def clear(self) -> None:
        for aliases in self.samples.values():
            for one in aliases:
                for alias in one.values():
                    alias.grad = None


class PerSampleForward(Replaced):
    """Stands in for the model's ``forward``."""

    def __init__(self, handle: AliasHandle) -> None:
        super().__init__(handle.model)
        self.handle = handle

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The per-sample forward pass, where per-sample gradients are wanted."""
        if not is_recorded(self.module):
            return self.original(*args, **kwargs)
        return self.handle.forward(pytree.plain(args), pytree.plain(kwargs))


class AliasHandle(Handle):
    """An engine of this kind at work on one model.

    Args:
        plan: how its calls carry their samples.
    """

    def __init__(self, module: nn.Module, plan: Plan) -> None:
        self.model = module
        self.plan = plan
        self.counts: Callable[[], tuple[int, ...]] = no_counts
        self._iterations = Iterations(module, AliasIteration)
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.slots = parameter_slots(module, self._parameters)
        self._replaced = PerSampleForward(self)
        self.original = self._replaced.original
        self._replaced.put_in()

    @override
    def detach(self) -> None:
        self._replaced.take_out()
        self._iterations.finish()

    @property
    @override
    def busy(self) -> bool:
        return self._iterations.begun

    @override
    def clear(self) -> None:
        self._iterations.clear()

    @override
    def finish(self) -> None:
        self._iterations.finish()

    def forward(self, args: Any, kwargs: Any) -> Any:
        """The model's forward with aliases in the place of its parameters.

        Returns:
            The model's output for the whole batch.
        """
        layout = known_layout(self.plan.calls, self.model, args, kwargs, self.counts())
        samples = samples_in(layout, self.model, args, kwargs)
        sets = self._iterations.present().samples
        if samples not in sets:
            sets[samples] = self.aliases_for(samples)
        return self.run(layout, args, kwargs, samples, sets[samples])

    @override
    def collect(self, parameters: list[nn.Parameter]) -> list[int]:
        names = {p: name for name, p in self._parameters.items()}
        found = self._iterations.arrived()
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
        """Weight of every sample in the batch's loss: one number, or shape ``[samples]``."""
        return self.plan.weight(samples, self.counts())

    @abstractmethod
    def aliases_for(self, samples: int) -> list[Aliases]:
        """New aliases of the trainable parameters."""

    @abstractmethod
    def run(self, layout: CallLayout, args: Any, kwargs: Any, samples: int, aliases: list[Aliases]) -> Any:
        """The model's forward with aliases in the place of parameters.

        Returns:
            The model's output for the whole batch.
        """

    @abstractmethod
    def fill(self, out: torch.Tensor, aliases: list[Aliases], name: str, scale: float | torch.Tensor) -> None:
        """Write per-sample gradients where a gradient arrived.

        Args:
            out: zeros, shape ``[samples, *parameter]``.
            scale: what gradients are multiplied with: one number, or shape ``[samples]``.
        """

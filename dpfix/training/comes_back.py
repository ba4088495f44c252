"""Parameters that no gradient reached when the step was checked, and that the loop trains later after all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from dpfix.engines.replaced import is_recorded
from dpfix.instrument import pytree


class _Noticed(torch.autograd.Function):
    """The same tensor; gradient that comes back to it is noticed."""

    @staticmethod
    def forward(ctx: Any, t: torch.Tensor, anchor: torch.Tensor, arrived: Callable[[], None]) -> Any:  # type: ignore[override]
        ctx.arrived = arrived
        return t.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        ctx.arrived()
        return gradient, None, None


class Arrivals:
    """Notices gradient that reaches the output of a module whose parameters are frozen in private training.

    A copy of the outputs of these modules is all that it costs. A parameter of a module that is not called by itself (in a
    ``ParameterDict``) is not watched; nor is one beside others that are trained (the mask token of an embedding that adds
    a class token): gradient reaches the output of that module in any case.

    Args:
        module: the model.
        frozen: names of the parameters.
        on_arrival: called when gradient arrives.

    Attributes:
        names: parameters of the modules that gradient has reached.
    """

    def __init__(self, module: nn.Module, frozen: Iterable[str], on_arrival: Callable[[], None]) -> None:
        self.names: set[str] = set()
        self._module, self._on_arrival = module, on_arrival
        self._anchor = torch.zeros((), requires_grad=True)
        owners: dict[str, set[str]] = {}
        for name in frozen:
            owners.setdefault(name.rpartition(".")[0], set()).add(name)
        self._handles = [
            module.get_submodule(path).register_forward_hook(_Hook(self, names))
            for path, names in owners.items()
            if path and not any(p.requires_grad for p in module.get_submodule(path).parameters())
        ]

    def detach(self) -> None:
        """Watch no longer."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def watched(self, output: Any, names: set[str]) -> Any:
        """The output of a module.

        Args:
            names: its parameters that are frozen.

        Returns:
            The same values.
        """
        if not is_recorded(self._module):
            return output

        def arrived() -> None:
            self.names |= names
            self._on_arrival()

        def leaf_of(_: pytree.Path, leaf: Any) -> Any:
            floating = isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
            return _Noticed.apply(leaf, self._anchor, arrived) if floating else leaf

        return pytree.map_leaves(leaf_of, output)


class _Hook:
    """Stands among the hooks of a module; in a copy of it, it does nothing."""

    def __init__(self, arrivals: Arrivals | None = None, names: Iterable[str] = ()) -> None:
        self._arrivals, self._names = arrivals, set(names)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return output if self._arrivals is None else self._arrivals.watched(output, self._names)

    def __reduce__(self) -> Any:
        return _Hook, ()

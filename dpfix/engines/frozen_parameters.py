"""Parameters that are frozen in private training, as the model sees them: gradient that reaches one is noticed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from dpfix.engines.functional.parameter_swap import Aliases, parameter_slots, swapped
from dpfix.engines.replaced import Replaced, is_recorded


class Frozen(nn.Parameter):
    """Stands in for a frozen parameter while the model is called: the same values, to which gradient can come.

    Attributes:
        arrived: called when gradient comes, by autograd or by an engine that keeps it out of the graph.
    """

    arrived: Callable[[], None]

    @staticmethod
    def of(p: nn.Parameter, arrived: Callable[[], None]) -> Frozen:
        """A stand-in.

        Args:
            p: the parameter.
            arrived: called when gradient comes.

        Returns:
            An alias of the parameter.
        """
        alias = Frozen(p.detach())
        alias.arrived = arrived

        def forget(leaf: torch.Tensor) -> None:
            leaf.grad = None
            arrived()

        alias.register_post_accumulate_grad_hook(forget)
        return alias


class Arrivals:
    """Notices gradient that reaches parameters which are frozen in private training.

    Whenever the model, or a module that holds such a parameter, is called in training, aliases stand in the place of these
    parameters wherever the model holds them. Nothing is computed for them unless gradient does come.

    Args:
        module: the model.
        frozen: names of the parameters.

    Attributes:
        names: parameters that gradient has reached; to be emptied by whoever has looked.
    """

    def __init__(self, module: nn.Module, frozen: Iterable[str]) -> None:
        self.names: set[str] = set()
        self.module = module
        self._parameters = {name: module.get_parameter(name) for name in frozen}
        self._aliases: Aliases = {n: Frozen.of(p, partial(self.names.add, n)) for n, p in self._parameters.items()}
        self._slots = parameter_slots(module, self._parameters)
        self._going_on = False
        held = {id(p) for p in self._parameters.values()}
        owners = [m for m in module.modules() if any(id(p) in held for p in m._parameters.values())]
        self._calls = [_Watched(self, m) for m in dict.fromkeys([module, *owners])] if held else []
        for call in self._calls:
            call.put_in()

    def detach(self) -> None:
        """Watch no longer."""
        for call in reversed(self._calls):
            call.take_out()
        self._calls.clear()

    def call(self, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The model, or a module in it, is called; ``original`` is what the call does."""
        if self._going_on or not is_recorded(self.module):
            return original(*args, **kwargs)
        for name, p in self._parameters.items():
            self._aliases[name].data = p.data  # which the script may have exchanged
        self._going_on = True
        try:
            with swapped(self._slots, self._aliases):
                return original(*args, **kwargs)
        finally:
            self._going_on = False


class _Watched(Replaced):
    """Stands in for what ``module(...)`` does, hooks included."""

    name = "_call_impl"

    def __init__(self, arrivals: Arrivals, module: nn.Module) -> None:
        super().__init__(module)
        self._arrivals = arrivals

    @torch.compiler.disable(recursive=False)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The call."""
        return self._arrivals.call(self.original, args, kwargs)

    @override
    def take_out(self) -> None:
        if vars(self.module).get(self.name) is self:  # not that of another training of the same model
            super().take_out()

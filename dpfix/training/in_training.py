"""Which private training a model is in: the model itself holds it, so that both are gone when the script drops them."""

from __future__ import annotations

from typing import Any

from torch import nn

from dpfix.training.lineage import note


class InTraining:
    """Stands among the hooks of a model in private training and holds the object whose ``cleanup`` ends it.

    It costs an empty call per forward pass. In a copy of the model, or a pickled one, it holds nothing.
    """

    def __init__(self, holder: Any = None) -> None:
        self.holder = holder

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Nothing happens."""

    def __reduce__(self) -> Any:
        if self.holder is not None:
            note(self.holder._module.parameters())  # a copy of the model is being made
        return InTraining, ()


def begin(module: nn.Module, holder: Any) -> None:
    """A private training of this model begins.

    Args:
        module: the plain model.
        holder: the object whose ``cleanup`` ends it.
    """
    module.register_forward_pre_hook(InTraining(holder))


def holder_of(module: nn.Module) -> Any:
    """The object whose ``cleanup`` ends the private training that a model is in; ``None`` if it is in none."""
    return next((hook.holder for hook in _marks(module).values() if hook.holder is not None), None)


def end(module: nn.Module) -> None:
    """The private training of this model is over."""
    for key in _marks(module):
        del module._forward_pre_hooks[key]


def _marks(module: nn.Module) -> dict[int, InTraining]:
    return {key: hook for key, hook in module._forward_pre_hooks.items() if isinstance(hook, InTraining)}

"""The modules and parameters of a model, remembered so that a look at every step is cheap."""

from __future__ import annotations

import operator
from itertools import chain

from opacus.optimizers import DPOptimizer
from torch import nn


class Structure:
    """The modules and parameters of a model, remembered so that a look at every step is cheap.

    The walk is made by ``map`` over functions of ``operator``: a step of a small model takes as long as a few thousand
    lines of Python.
    """

    def __init__(self, module: nn.Module) -> None:
        modules = list(module.modules())
        self._holders = [h for m in modules for h in (m._modules, m._parameters) if h]
        self._sizes = list(map(len, self._holders))
        self._things = list(chain.from_iterable(map(_VALUES, self._holders)))
        self._parameters = list(module.parameters())
        self._flags = list(map(_TRAINED, self._parameters))
        self._known = {id(p) for p in self._parameters}
        self._names = _named(module)
        self._grouped: list[nn.Parameter] = []

    def unchanged(self) -> bool:
        """Whether every module and parameter is the same object, trained or frozen as before."""
        return (
            list(map(len, self._holders)) == self._sizes
            and all(map(operator.is_, chain.from_iterable(map(_VALUES, self._holders)), self._things))
            and list(map(_TRAINED, self._parameters)) == self._flags
        )

    def changes(self, module: nn.Module) -> list[str]:
        """What has changed, by name: parameters first.

        Args:
            module: the model.

        Returns:
            Words like ``parameter `0.weight```.
        """
        now = _named(module)
        return sorted(
            (key for key in now.keys() | self._names.keys() if now.get(key) != self._names.get(key)),
            key=lambda key: (key.startswith("module"), key),
        )

    def grouped_as_before(self, optimizer: DPOptimizer) -> bool:
        """Whether the optimizer's groups hold the very parameters of the last call that was confirmed."""
        groups = [group["params"] for group in optimizer.param_groups]
        before = self._grouped
        return sum(map(len, groups)) == len(before) and all(map(operator.is_, chain.from_iterable(groups), before))

    def confirm_groups(self, optimizer: DPOptimizer) -> None:
        """Remember the optimizer's groups; not with a parameter that :meth:`unchanged` does not look at."""
        held = [p for group in optimizer.param_groups for p in group["params"]]
        self._grouped = held if all(id(p) in self._known for p in held) else []


def _named(module: nn.Module) -> dict[str, tuple[int, bool]]:
    found = {f"module `{name}`": (id(m), False) for name, m in module.named_modules()}
    return found | {f"parameter `{name}`": (id(p), p.requires_grad) for name, p in module.named_parameters()}


_VALUES = operator.methodcaller("values")
_TRAINED = operator.attrgetter("requires_grad")

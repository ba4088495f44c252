"""Modules whose output is the same for all samples: a bias for every pair of positions, a table that a network computes.

Such an output is made of parameters and constants. Where the model only adds it to what depends on the samples, it is
given to each of them at once. Where the model turns it into another shape first (``[pairs, heads]`` into
``[1, heads, queries, keys]``, or a prompt that is repeated for every sample), there is no dimension for the samples in it:
then the module around that uses it diverts the functions on these parameters, and they are given to the samples where they
meet them.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from dpfix.instrument.parameter_uses import MARK, function_in, used_in
from dpfix.layout.calls import LayerLayout

_RESHAPING = frozenset({
    "view", "reshape", "flatten", "unflatten", "view_as", "reshape_as", "permute", "transpose", "movedim", "swapaxes", "t", "T",
    "mT", "unsqueeze", "squeeze", "__getitem__", "index_select", "gather", "take", "select", "chunk", "split", "unbind", "repeat",
    "tile",
})  # fmt: skip


def users_of_shared(modules: dict[str, nn.Module], layers: Sequence[LayerLayout]) -> dict[str, str]:
    """Which modules make something that is the same for all samples and then gets another shape.

    Args:
        modules: the modules of the model by path.
        layers: the calls that the probe has shown, and the functions on parameters.

    Returns:
        For each of them the nearest module around that is called and returns nothing of that kind.
    """
    calls = [c for c in layers if MARK not in c.path]
    called = {c.path for c in calls}
    varying = {c.path for c in calls if not c.output or any(dim is not None for _, dim in (*c.inputs, *c.output))}
    sharing = {c.path for c in calls if any(dim is None for _, dim in c.output)}
    names = {id(p): name for name, p in modules[""].named_parameters()}
    made = (c.path for c in layers if MARK in c.path and c.path.endswith(")"))
    sources = {name for use in made if function_in(use) in _RESHAPING for name in _parameters(use)}

    def user(path: str) -> str:
        while path and (path not in called or path in sharing):
            path = path.rpartition(".")[0]
        return path

    def reshaped(path: str) -> bool:
        return any(names.get(id(p)) in sources for p in modules[path]._parameters.values())

    return {path: user(path) for path in sorted(called - varying) if path and reshaped(path)}


def _parameters(use: str) -> set[str]:
    """The parameters that something is made of."""
    return {name for part in used_in(use) for name in (_parameters(part) if MARK in part else {part})}

"""The tree of modules in words, before the repairs and after, for the report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from dpfix.report.report import Layer


def tree_of(model: nn.Module) -> dict[str, str]:
    """What stands at every path of a model.

    Options are told of PyTorch's own classes only: ``extra_repr`` of another one is the script's code, and may print values.

    Returns:
        Class and options by path.
    """
    return {path: _words(module) for path, module in model.named_modules()}


def _words(module: nn.Module) -> str:
    kind = type(module)
    own = kind.__module__.partition(".")[0] == "torch" and kind.extra_repr is not nn.Module.extra_repr
    return f"{kind.__name__}({module.extra_repr()})" if own else kind.__name__


def layers(before: Mapping[str, str], after: Mapping[str, str]) -> tuple[Layer, ...]:
    """Both trees beside each other.

    Args:
        before: of :func:`tree_of`.
        after: the same for the repaired model.

    Returns:
        A layer for every path, those that are gone at the end.
    """
    return tuple(Layer(path, before.get(path, ""), after.get(path, "")) for path in {**after, **before})


def before_of(found: Iterable[Layer]) -> dict[str, str]:
    """The tree that stood first."""
    return {layer.path: layer.before for layer in found if layer.before}

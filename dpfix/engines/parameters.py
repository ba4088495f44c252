"""Where a model holds its parameters, and putting other tensors there for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

Aliases = dict[str, torch.Tensor]
"""Tensors that stand in for parameters, by parameter name."""


def parameter_slots(root: nn.Module, parameters: dict[str, nn.Parameter]) -> list[tuple[Any, Any, str]]:
    """Every place inside a model that holds one of some parameters.

    Besides the registered names these are plain attributes, lists and dicts, such as the flat weights that
    ``nn.LSTM`` hands to its kernel.

    Args:
        root: the model.
        parameters: the parameters by name.

    Returns:
        ``(container, key, parameter name)``, each place once.
    """
    names = {id(p): name for name, p in parameters.items()}
    slots: list[tuple[Any, Any, str]] = []

    def look(container: Any, items: Any) -> None:
        slots.extend((container, key, names[id(v)]) for key, v in items if id(v) in names)

    for module in root.modules():
        look(module._parameters, module._parameters.items())
        for name, value in vars(module).items():
            if isinstance(value, dict) and name not in ("_parameters", "_buffers", "_modules"):
                look(value, value.items())
            elif isinstance(value, list):
                look(value, enumerate(value))
        look(vars(module), vars(module).items())
    return slots


@contextmanager
def swapped(slots: list[tuple[Any, Any, str]], tensors: Aliases) -> Iterator[None]:
    """Put other tensors in the place of parameters.

    Args:
        slots: ``(container, key, parameter name)``.
        tensors: the tensors by parameter name.

    Yields:
        Nothing.
    """
    before = [container[key] for container, key, _ in slots]
    try:
        for container, key, name in slots:
            container[key] = tensors[name]
        yield
    finally:
        for (container, key, _), value in zip(slots, before, strict=True):
            container[key] = value


@contextmanager
def attributes_kept(module: Any) -> Iterator[None]:
    """Tensors that live inside ``vmap`` only do not stay behind as attributes; the old ``weight_norm`` keeps its weight so.

    Args:
        module: a module; anything else is let be.

    Yields:
        Nothing.
    """
    owners = list(module.modules()) if isinstance(module, nn.Module) else []
    before = [{n: v for n, v in vars(m).items() if isinstance(v, torch.Tensor)} for m in owners]
    try:
        yield
    finally:
        for owner, held in zip(owners, before, strict=True):
            for name, value in held.items():
                if torch._C._functorch.is_functorch_wrapped_tensor(vars(owner).get(name, value)):  # type: ignore[attr-defined]
                    vars(owner)[name] = value

"""Where a model holds its parameters, and putting other tensors there for a while."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

Aliases = dict[str, torch.Tensor]
"""Tensors that stand in for parameters, by parameter name."""


Slot = tuple[Any, Any, "str | dict[Any, str]"]
"""``(container, key, parameter name)``; for a list or dict inside, its own keys with the parameter names."""


def parameter_slots(root: nn.Module, parameters: dict[str, nn.Parameter]) -> list[Slot]:
    """Every place inside a model that holds one of some parameters.

    Besides the registered names these are plain attributes, lists and dicts, such as the flat weights that
    ``nn.LSTM`` hands to its kernel.

    Returns:
        Each place once.
    """
    names = {id(p): name for name, p in parameters.items()}

    def held(items: Iterable[tuple[Any, Any]]) -> dict[Any, str]:
        return {key: names[id(v)] for key, v in items if id(v) in names}

    slots: list[Slot] = []
    for module in root.modules():
        attributes = vars(module)
        slots += [(module._parameters, key, name) for key, name in held(module._parameters.items()).items()]
        slots += [(attributes, key, name) for key, name in held(attributes.items()).items()]
        for key, value in attributes.items():
            if isinstance(value, (dict, list)) and key not in ("_parameters", "_buffers", "_modules"):
                inside = held(value.items() if isinstance(value, dict) else enumerate(value))
                slots += [(attributes, key, inside)] if inside else []
    return slots


@contextmanager
def swapped(slots: list[Slot], tensors: Aliases) -> Iterator[None]:
    """Put other tensors in the place of parameters; an interrupt while they are put back does not keep them from it.

    A list or dict is replaced as a whole, and so put back when the module has made a new one meanwhile: ``nn.LSTM`` does.

    Args:
        slots: what :func:`parameter_slots` found.
        tensors: the tensors by parameter name.

    Yields:
        Nothing.
    """
    before = [container[key] for container, key, _ in slots]
    try:
        for (container, key, name), value in zip(slots, before, strict=True):
            container[key] = tensors[name] if isinstance(name, str) else _filled(value, name, tensors)
        yield
        _put_back(slots, before)
    except BaseException:
        _put_back(slots, before)
        raise


def _put_back(slots: list[Slot], values: list[Any]) -> None:
    for (container, key, _), value in zip(slots, values, strict=True):
        container[key] = value


def _filled(held: Any, names: dict[Any, str], tensors: Aliases) -> Any:
    filled = copy.copy(held)
    for key, name in names.items():
        filled[key] = tensors[name]
    return filled


@contextmanager
def attributes_kept(module: Any) -> Iterator[None]:
    """Tensors that live inside ``vmap`` only do not stay behind as attributes; the old ``weight_norm`` keeps its weight so.

    Args:
        module: a module; with anything else nothing happens.

    Yields:
        Nothing.
    """
    owners = list(module.modules()) if isinstance(module, nn.Module) else []
    before = [{n: v for n, v in vars(m).items() if isinstance(v, torch.Tensor)} for m in owners]
    try:
        yield
        _unwrap(owners, before)
    except BaseException:
        _unwrap(owners, before)
        raise


def _unwrap(owners: list[nn.Module], before: list[dict[str, torch.Tensor]]) -> None:
    for owner, held in zip(owners, before, strict=True):
        for name, value in held.items():
            if torch._C._functorch.is_functorch_wrapped_tensor(vars(owner).get(name, value)):  # type: ignore[attr-defined]
                vars(owner)[name] = value

"""What the layers of a repaired model were before, for as long as the model lives."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.utils.weak import WeakIdKeyDictionary


@dataclass(frozen=True)
class Origin:
    """What a repaired layer was before.

    Attributes:
        change: in words, for example ``BatchNorm2d -> GroupNorm(4, 8)``.
        exact: whether the repaired layer computes the same.
        shell: the original layer on the meta device, without values; ``None`` if only attributes were set.
        attributes: the attributes that were set, with their original values.
        stays: whether the layer stays so in an export, because the original one computes something else.
    """

    change: str
    exact: bool
    shell: nn.Module | None
    attributes: Mapping[str, Any]
    stays: bool


_ORIGINS: WeakKeyDictionary[nn.Module, Origin] = WeakKeyDictionary()
_FROZEN: Any = WeakIdKeyDictionary()
_DTYPES: Any = WeakIdKeyDictionary()
REMEMBERED = (_ORIGINS, _FROZEN, _DTYPES)
"""Everything that is remembered, for whoever undoes changes of models."""


def remember_replaced(old: nn.Module, new: nn.Module, change: str, exact: bool) -> None:
    """Remember which layer a new one replaces; ``change`` and ``exact`` as in :class:`Origin`."""
    _ORIGINS[new] = Origin(f"{type(old).__name__} -> {change}", exact, _shell(old), {}, not exact)


def remember_attributes(
    module: nn.Module, before: Mapping[str, Any], change: str, exact: bool, *, taken_back: bool = False
) -> None:
    """Remember the values that attributes of a layer have before they are set; see :func:`remember_replaced`.

    Args:
        taken_back: whether an export gives them back although the layer computes something else with them.
    """
    earlier, stays = _ORIGINS.get(module), not (exact or taken_back)
    kept = dict(before) if earlier is None else dict(before) | dict(earlier.attributes)
    _ORIGINS[module] = Origin(
        f"{type(module).__name__}: {change}", exact, None, kept, stays or (earlier is not None and earlier.stays)
    )


def remember_frozen(parameter: nn.Parameter) -> None:
    """Remember that a parameter was trainable before private training froze it."""
    _FROZEN[parameter] = True


def was_trainable(parameter: nn.Parameter) -> bool:
    """Whether a parameter was trainable before private training froze it."""
    return parameter in _FROZEN


def remember_dtype(parameter: nn.Parameter) -> None:
    """Remember the type that a parameter has before it gets another one."""
    _DTYPES.setdefault(parameter, parameter.dtype)


def dtype_before(parameter: nn.Parameter) -> torch.dtype:
    """The type that a parameter had before private training gave it another one."""
    return _DTYPES.get(parameter, parameter.dtype)


def origins_in(model: nn.Module) -> Iterator[tuple[str, Origin]]:
    """The repaired layers of a model, under every path that leads to them.

    Yields:
        ``(module path, origin)`` pairs.
    """
    for path, module in model.named_modules(remove_duplicate=False):
        origin = _ORIGINS.get(module)
        if origin is not None:
            yield path, origin


def _shell(module: nn.Module) -> nn.Module:
    """A copy without values: class, options, names, shapes, dtypes and flags."""
    memo: dict[int, Any] = {}
    for p in module.parameters():
        if not isinstance(p, UninitializedParameter):
            memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
    for b in module.buffers():
        memo[id(b)] = torch.empty_like(b, device="meta")
    return copy.deepcopy(module, memo)

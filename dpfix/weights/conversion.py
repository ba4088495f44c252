"""From the keys of a checkpoint to those of a model: every key is used, renamed, left out or filled, with the reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

_LAZY = (UninitializedParameter, UninitializedBuffer)


@dataclass(frozen=True)
class Adjustment:
    """An attribute of a module that has to have another value for the weights to compute the same."""

    module: nn.Module
    path: str
    name: str
    value: float
    reason: str

    def apply(self) -> None:
        """Set the attribute."""
        setattr(self.module, self.name, self.value)

    def __str__(self) -> str:
        """The change in words, as long as it has not been made."""
        return f"{self.path}.{self.name} = {self.value:g} (was {getattr(self.module, self.name):g}): {self.reason}"


@dataclass
class Conversion:
    """A state dict on its way into a model. The checkpoint's own mapping is only read.

    Attributes:
        old: the checkpoint's tensors by key.
        wanted: the model's tensors by key, for shapes and dtypes.
        values: tensors by the model's keys.
        sources: the checkpoint's keys that each of them was made of.
        filled: keys of the model that get a value the checkpoint does not have, with the reason.
        dropped: keys of the checkpoint that are left out, with the reason.
        adjusted: attributes to set on modules.
        missing: keys of the model without a source, with the keys that were looked for.
        refusals: why the model cannot compute the same.
        assumed: what cannot be told from the weights.
    """

    old: Mapping[str, Tensor]
    wanted: Mapping[str, Tensor]
    values: dict[str, Tensor] = field(default_factory=dict)
    sources: dict[str, tuple[str, ...]] = field(default_factory=dict)
    filled: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    adjusted: list[Adjustment] = field(default_factory=list)
    missing: dict[str, tuple[str, ...]] = field(default_factory=dict)
    refusals: list[str] = field(default_factory=list)
    assumed: list[str] = field(default_factory=list)

    def take(self, new: str, *old: str, join: Callable[[list[Tensor]], Tensor] | None = None) -> None:
        """Make a tensor of the model out of tensors of the checkpoint.

        Args:
            new: the model's key; nothing happens if the model does not have it, or if it has its value already.
            *old: the checkpoint's keys.
            join: makes one tensor of several; they are concatenated along the first dimension if not given.
        """
        if new not in self.wanted or new in self.sources:
            return
        absent = tuple(key for key in old if key not in self.old)
        if absent:
            self.missing[new] = absent
            return
        tensors = [self.old[key] for key in old]
        self.values[new] = (join or torch.cat)(tensors) if len(tensors) > 1 else tensors[0]
        self.sources[new] = old

    def fill(self, new: str, value: Tensor, reason: str) -> None:
        """Give a tensor of the model a value that the checkpoint does not have, with the reason why it is right."""
        if new in self.wanted and new not in self.sources:
            self.values[new], self.filled[new], self.sources[new] = value, reason, ()

    def drop(self, old: str, reason: str) -> None:
        """Leave a tensor of the checkpoint out if it is there, with the reason why it has no effect."""
        if old in self.old:
            self.dropped[old] = reason

    def take_rest(self) -> None:
        """Take every other tensor of the model from the same key of the checkpoint."""
        for key in self.wanted:
            if key not in self.missing:
                self.take(key, key)

    @property
    def renamed(self) -> dict[str, tuple[str, ...]]:
        """Keys of the model whose value comes from other keys."""
        return {new: old for new, old in self.sources.items() if old and old != (new,)}

    @property
    def unused(self) -> tuple[str, ...]:
        """Keys of the checkpoint that nothing was made of."""
        used = {key for old in self.sources.values() for key in old} | self.dropped.keys()
        return tuple(key for key in self.old if key not in used)

    @property
    def misshapen(self) -> dict[str, tuple[list[int], list[int]]]:
        """Keys of the model whose new value has another shape, with the checkpoint's and the model's shape."""
        return {
            key: (list(value.shape), list(self.wanted[key].shape))
            for key, value in self.values.items()
            if not isinstance(self.wanted[key], _LAZY) and value.shape != self.wanted[key].shape
        }

    @property
    def complete(self) -> bool:
        """Whether every key on both sides is accounted for, with the right shape."""
        return not (self.missing or self.unused or self.misshapen or self.refusals)

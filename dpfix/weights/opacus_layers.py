"""The weights of Opacus's replacement layers under the keys of torch's own layers, and back.

Opacus gives these layers a ``state_dict`` of their own; inside a model torch calls only half of those methods, so neither
saving nor loading a whole model goes through them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from opacus.layers import DPMultiheadAttention
from torch import Tensor, nn

_LETTERS = ("q", "k", "v")


def original_state(layer: nn.Module, keys: Iterable[str]) -> dict[str, Tensor]:
    """The weights of Opacus's layer under the keys of the original."""
    if not isinstance(layer, DPMultiheadAttention):
        # recurrent layers keep torch's names besides their own
        return {key: getattr(layer, key).detach() for key in keys}
    return {key: _attention_weight(layer, key).detach() for key in keys}


def _attention_weight(layer: DPMultiheadAttention, key: str) -> Tensor:
    linear = [getattr(layer, f"{letter}linear") for letter in _LETTERS]
    if key in ("in_proj_weight", "in_proj_bias"):
        return torch.cat([getattr(part, key.removeprefix("in_proj_")) for part in linear])
    if key.endswith("_proj_weight"):
        return linear[_LETTERS.index(key[0])].weight
    if key.startswith("bias_"):
        return getattr(layer, f"seq_bias_{key[-1]}").bias.view(1, 1, -1)
    return layer.get_parameter(key)


def replacement_state(layer: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by the original's keys, under those that torch looks for when it loads a model with Opacus's layer."""
    if not isinstance(layer, DPMultiheadAttention):
        return dict(state)
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        if key in ("in_proj_weight", "in_proj_bias"):
            name = key.removeprefix("in_proj_")
            out |= {f"{letter}linear.{name}": part for letter, part in zip(_LETTERS, value.chunk(3), strict=True)}
        elif key.endswith("_proj_weight"):
            out[f"{key[0]}linear.weight"] = value
        elif key.startswith("bias_"):
            out[f"seq_bias_{key[-1]}.bias"] = value.reshape(-1)
        else:
            out[key] = value
    return out

"""From a model in private training back to the original architecture: its classes, its keys, nothing of dpfix on it."""

from __future__ import annotations

import copy
import importlib.util
import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dpfix.instrument.source import warn_user
from dpfix.weights import files
from dpfix.weights.copies import plain_copy, unwrap
from dpfix.weights.opacus_layers import original_state
from dpfix.weights.origins import Origin, dtype_before, origins_in, was_trainable


def export_plain(model: nn.Module) -> nn.Module:
    """A copy of a model in private training, as it was built.

    Wrappers, hooks and what dpfix sets on layers are gone; layers that an exact repair replaced are the original ones
    again, with the trained weights under the original keys. Layers of a repair that changed the model (BatchNorm ->
    GroupNorm) stay, because the original ones would compute something else; :func:`changed_layers` lists them.

    Args:
        model: the model that :func:`make_private_safe` returned, or the one that was given to it.

    Returns:
        The copy; the given model goes on training.
    """
    module = unwrap(model)
    copied = plain_copy(module)
    for name, p in module.named_parameters():
        exported = copied.get_parameter(name)
        exported.data = exported.data.to(dtype_before(p))
    restored: dict[nn.Module, nn.Module] = {}
    for path, origin in origins_in(module):
        part = copied.get_submodule(path)
        if origin.stays:
            continue
        if origin.shell is None:
            for name, value in origin.attributes.items():
                setattr(part, name, value)
            continue
        if part not in restored:
            restored[part] = _original(part, origin)
        above, _, name = path.rpartition(".")
        copied.get_submodule(above)._modules[name] = restored[part]
    for name, p in module.named_parameters():
        if was_trainable(p):
            copied.get_parameter(name).requires_grad_(True)
    _warn(changed_layers(module))
    return copied


def plain_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a model in private training, under the keys of the original architecture.

    Args:
        model: see :func:`export_plain`.

    Returns:
        Copies of the weights; ``original.load_state_dict(...)`` takes them unless a repair changed the model.
    """
    return dict(export_plain(model).state_dict())


def save_plain(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write the weights of a model in private training under the keys of the original architecture.

    Args:
        model: see :func:`export_plain`.
        path: where to; ``.safetensors`` and everything else choose the format, a name without an ending gets
            ``.safetensors`` if that package is installed and ``.pt`` if not.

    Returns:
        The file.
    """
    file = Path(path)
    if not file.suffix:
        file = file.with_suffix(".safetensors" if importlib.util.find_spec("safetensors") else ".pt")
    return files.write(plain_state_dict(model), file)


def changed_layers(model: nn.Module) -> dict[str, str]:
    """The layers of a repaired model that compute something else than the original ones.

    Args:
        model: see :func:`export_plain`.

    Returns:
        Module path and change, for example ``{"body.1": "BatchNorm2d -> GroupNorm(4, 8)"}``.
    """
    return {path: origin.change for path, origin in origins_in(unwrap(model)) if origin.stays}


def _original(part: nn.Module, origin: Origin) -> nn.Module:
    assert origin.shell is not None
    layer: Any = copy.deepcopy(origin.shell)
    state = {key: value.clone() for key, value in original_state(part, layer.state_dict()).items()}
    layer.load_state_dict(state, assign=True)
    return layer.train(part.training)


def _warn(changed: dict[str, str]) -> None:
    if not changed:
        return
    shown = [f"`{path}`: {change}" for path, change in list(changed.items())[:3]]
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    warn_user(
        f"{len(changed)} layers stay as they were repaired, because the original ones compute something else: "
        f"{'; '.join(shown)}{more}. Load the weights into a model with these layers; dpfix.changed_layers lists all."
    )

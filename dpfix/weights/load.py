"""Loading weights of other packages: every key is used, renamed by a stated mapping, or named in an error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dpfix.errors import (
    ArgumentError,
    CheckpointError,
    MissingKeysError,
    NotConvertibleError,
    ShapeMismatchError,
    UnusedKeysError,
)
from dpfix.weights import files, legacy
from dpfix.weights.conversion import Conversion
from dpfix.weights.copies import unwrap
from dpfix.weights.opacus_layers import original_state, replacement_state
from dpfix.weights.origins import origins_in

AS_IS = "as is"
SOURCES = (AS_IS, legacy.SOURCE)
_PREFIXES = ("module.", "_module.")
_COMPILED = "_orig_mod."


@dataclass(frozen=True)
class LoadReport:
    """What became of every key of a checkpoint and of every weight of the model.

    Attributes:
        source: ``"as is"`` or ``"monai-generative"``.
        loaded: keys that are the same on both sides.
        renamed: keys of the model with the checkpoint's keys that their values were made of.
        filled: keys of the model that got a value the checkpoint does not have, with the reason.
        dropped: keys of the checkpoint that were left out, with the reason.
        adjusted: attributes of modules that were set, with the reason.
        unused: keys of the checkpoint without a place (only with ``strict=False``).
        missing: weights of the model that stayed as they were (only with ``strict=False``).
        stripped: prefixes that were taken off the checkpoint's keys.
        assumed: what cannot be told from the weights.
    """

    source: str
    loaded: tuple[str, ...]
    renamed: Mapping[str, tuple[str, ...]]
    filled: Mapping[str, str]
    dropped: Mapping[str, str]
    adjusted: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    stripped: tuple[str, ...] = ()
    assumed: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        counts = {
            "same key": len(self.loaded),
            "renamed": len(self.renamed),
            "filled": len(self.filled),
            "left out": len(self.dropped),
            "unused": len(self.unused),
            "missing": len(self.missing),
        }
        lines = [f"loaded {self.source}: " + ", ".join(f"{n} {name}" for name, n in counts.items() if n)]
        lines += [f"  prefix taken off: {prefix}" for prefix in self.stripped]
        lines += [f"  {new} <- {' + '.join(old)}" for new, old in self.renamed.items()]
        lines += [f"  {key}: {reason}" for key, reason in self.filled.items()]
        lines += [f"  {key} left out: {reason}" for key, reason in self.dropped.items()]
        lines += [f"  set {text}" for text in self.adjusted]
        lines += [f"  unused: {key}" for key in self.unused] + [f"  missing: {key}" for key in self.missing]
        lines += [f"  assumed: {text}" for text in self.assumed]
        return "\n".join(lines)


def load_pretrained(
    model: nn.Module,
    checkpoint: files.Source,
    *,
    source: str | None = None,
    strict: bool = True,
    entry: str | None = None,
    legacy_projection: str = "identity",
) -> LoadReport:
    """Load weights into a model, and account for every key.

    Works before and after :func:`make_private_safe`, and on wrapped models. Nothing is changed if anything is refused,
    and the checkpoint's own mapping never is.

    Args:
        model: the model.
        checkpoint: a state dict, a mapping that holds one, or a file (``.safetensors``, or of ``torch.save``).
        source: ``"as is"``, ``"monai-generative"`` for a network of MONAI that was trained with monai-generative 0.2.x,
            or found out from the keys if not given.
        strict: refuse keys without a place and weights without a key; otherwise they are listed in the report.
        entry: the key of the checkpoint that holds the state dict, if it is not one of the usual names.
        legacy_projection: what ``proj_attn`` of monai-generative becomes: ``"identity"``, which is what 0.2.3 computes,
            or ``"proj_attn"`` for checkpoints of code that applied it.

    Returns:
        What became of every key.

    Raises:
        ArgumentError: an argument has no such value, or there is no state dict in the checkpoint.
    """
    _check(source, legacy_projection)
    module = unwrap(model)
    wanted = keyed_as_original(module)
    old, stripped = strip_prefixes(files.tensors(checkpoint, entry), wanted)
    conversion, source = _conversion(module, old, wanted, source, legacy_projection)
    _refuse(module, conversion, source, strict)
    adjusted = tuple(map(str, conversion.adjusted))
    _apply(module, conversion)
    renamed = conversion.renamed
    return LoadReport(
        source=source,
        loaded=tuple(key for key, old in conversion.sources.items() if old and key not in renamed),
        renamed=renamed,
        filled=conversion.filled,
        dropped=conversion.dropped,
        adjusted=adjusted,
        unused=conversion.unused,
        missing=tuple(conversion.missing),
        stripped=stripped,
        assumed=tuple(conversion.assumed),
    )


def strip_prefixes(old: Mapping[str, Tensor], wanted: Mapping[str, Any]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Remove the prefixes that wrappers put before the keys of the model inside them.

    Args:
        old: the checkpoint's tensors by key.
        wanted: the model's keys; a prefix that they have too stays.

    Returns:
        The tensors by the inner model's keys, and the prefixes that were taken off.
    """
    stripped: list[str] = []
    out = dict(old)
    if not any(_COMPILED in key for key in wanted) and any(_COMPILED in key for key in out):
        out = {key.replace(_COMPILED, ""): value for key, value in out.items()}
        stripped.append(_COMPILED)
    while prefix := next((p for p in _PREFIXES if out and all(key.startswith(p) for key in out)), None):
        if any(key.startswith(prefix) for key in wanted):
            break
        out = {key.removeprefix(prefix): value for key, value in out.items()}
        stripped.append(prefix)
    return out, tuple(stripped)


def _check(source: str | None, projection: str) -> None:
    if source is not None and source not in SOURCES:
        raise ArgumentError(f"source={source!r} is none of {', '.join(map(repr, SOURCES))}.", path="source")
    if projection not in legacy.PROJECTIONS:
        raise ArgumentError(
            f"legacy_projection={projection!r} is none of {', '.join(map(repr, legacy.PROJECTIONS))}.",
            path="legacy_projection",
        )


def _conversion(
    module: nn.Module, old: Mapping[str, Tensor], wanted: Mapping[str, Tensor], source: str | None, projection: str
) -> tuple[Conversion, str]:
    plain = Conversion(old, wanted)
    plain.take_rest()
    _drop_repaired(module, plain)
    if source == AS_IS or (source is None and (plain.complete or not legacy.networks_in(module))):
        return plain, AS_IS
    if not legacy.networks_in(module):
        raise NotConvertibleError(
            f"source='monai-generative': {type(module).__name__} holds none of the networks that monai-generative had "
            f"({', '.join(legacy.NETWORKS)}).",
            help="Build the network from monai.networks.nets, and load into that.",
            path="source",
        )
    converted = legacy.convert(module, old, wanted, projection)
    _drop_repaired(module, converted)
    if source is None and not converted.renamed and not converted.refusals:
        return plain, AS_IS
    return converted, legacy.SOURCE


def keyed_as_original(module: nn.Module) -> dict[str, Tensor]:
    """The weights of a model without wrappers; where an exact repair replaced a layer, under the original's keys."""
    wanted = dict(module.state_dict())
    for path, layer, names in _replaced(module):
        wanted = {key: value for key, value in wanted.items() if not key.startswith(f"{path}.")}
        wanted |= {f"{path}.{name}": value for name, value in original_state(layer, names).items()}
    return wanted


def _replaced(module: nn.Module) -> list[tuple[str, nn.Module, list[str]]]:
    """Layers that stand for others with other keys: path, layer, and the original's keys."""
    return [
        (path, module.get_submodule(path), list(origin.shell.state_dict()))
        for path, origin in origins_in(module)
        if origin.exact and origin.shell is not None
    ]


def _drop_repaired(module: nn.Module, conversion: Conversion) -> None:
    """Leave out what only the original of a repaired layer has (running statistics)."""
    for path, origin in origins_in(module):
        if origin.shell is not None and not origin.exact:
            gone = origin.shell.state_dict().keys() - module.get_submodule(path).state_dict().keys()
        else:
            gone = {name for name, value in origin.attributes.items() if isinstance(value, Tensor)}
        for name in sorted(gone):
            conversion.drop(f"{path}.{name}", f"repaired: {origin.change}")


def _refuse(module: nn.Module, conversion: Conversion, source: str, strict: bool) -> None:
    name = type(module).__name__
    if conversion.refusals:
        reasons = "\n".join(conversion.refusals)
        raise NotConvertibleError(
            f"{name} cannot compute what the checkpoint's model did:\n{reasons}", path="checkpoint"
        )
    if conversion.misshapen:
        shapes = conversion.misshapen.items()
        rows = [f"{key}: {has} in the checkpoint, {wants} in the model" for key, (has, wants) in shapes]
        way_out = "Build the model with the arguments it was trained with."
        raise ShapeMismatchError(
            _told(f"{name} has weights of other shapes", rows, way_out), path=next(iter(conversion.misshapen))
        )
    unused = f"{len(conversion.unused)} keys of the checkpoint have no place: {_few(conversion.unused)}."
    if conversion.missing and strict:
        wanted = conversion.missing.items()
        rows = [key if old == (key,) else f"{key} (from {', '.join(old)})" for key, old in wanted]
        more = [unused] if conversion.unused else []
        way_out = f"Read {source!r}. Load into the model of the checkpoint; strict=False keeps the values they have."
        raise MissingKeysError(
            _told(f"{name} has weights that the checkpoint does not have", rows, *more, way_out),
            path=next(iter(conversion.missing)),
        )
    if conversion.unused and strict:
        raise UnusedKeysError(
            f"{name}: {unused} Read {source!r}.",
            "Weights that are not loaded are lost without a trace: load into the model of the checkpoint, or pass strict=False "
            "to leave them out.",
            path=conversion.unused[0],
        )


def _told(fact: str, rows: list[str], *more: str) -> str:
    shown = rows[:_SHOWN] + ([f"and {len(rows) - _SHOWN} more"] if len(rows) > _SHOWN else [])
    return "\n".join([f"{fact}:", *(f"  {row}" for row in shown), *more])


def _few(keys: tuple[str, ...]) -> str:
    return ", ".join(keys[:_SHOWN]) + (f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else "")


_SHOWN = 6


def _apply(module: nn.Module, conversion: Conversion) -> None:
    """Write the values, and read them back."""
    values = dict(conversion.values)
    for path, layer, _ in _replaced(module):
        part = {key.removeprefix(f"{path}."): values.pop(key) for key in list(values) if key.startswith(f"{path}.")}
        values |= {f"{path}.{name}": value for name, value in replacement_state(layer, part).items()}
    module.load_state_dict(values, strict=False)
    for adjustment in conversion.adjusted:
        adjustment.apply()
    written = keyed_as_original(module)
    for key, value in conversion.values.items():
        if not _same(written[key], value):
            raise CheckpointError(
                f"{key} of {type(module).__name__} does not have the checkpoint's value after loading: the module changes its "
                "weights when they are loaded, and now holds what it made of them.",
                help="Use its own load_state_dict.",
                path=key,
            )


def _same(there: Any, value: Any) -> bool:
    if not isinstance(there, Tensor) or not isinstance(value, Tensor):
        return True
    return torch.equal(there.cpu(), value.to("cpu", there.dtype)) or bool(torch.isnan(value).any())

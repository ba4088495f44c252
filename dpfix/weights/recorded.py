"""Comparing a converted model with outputs that were recorded from the old one, where both cannot be installed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dpfix.errors import ArgumentError, NotConvertibleError
from dpfix.instrument import pytree
from dpfix.instrument.rng import rng_untouched
from dpfix.weights import files, legacy
from dpfix.weights.copies import plain_copy, unwrap
from dpfix.weights.load import LoadReport, load_pretrained
from dpfix.weights.outputs import compare_outputs


@dataclass(frozen=True)
class Recording:
    """One call of the old model in ``eval()``.

    Attributes:
        inputs: the arguments.
        output: what it returned.
        method: what was called.
        seed: of ``torch.manual_seed`` right before the call, if the call draws random numbers.
    """

    inputs: tuple[Any, ...]
    output: Any
    method: str = "forward"
    seed: int | None = None


@dataclass(frozen=True)
class LegacyReport:
    """What :func:`verify_legacy` found. True in a boolean context if every recorded output is reproduced.

    Attributes:
        equal: whether every output agrees within the tolerance.
        differences: largest absolute difference of each recording.
        atol: the tolerance.
        projection: the ``legacy_projection`` that was used.
        other_projection: largest difference with the other one; ``None`` if it was not needed or cannot be loaded.
        loaded: what became of every key.
    """

    equal: bool
    differences: tuple[float, ...]
    atol: float
    projection: str
    other_projection: float | None
    loaded: LoadReport

    def __bool__(self) -> bool:
        return self.equal

    def __str__(self) -> str:
        worst = max(self.differences)
        told = "reproduces" if self.equal else "does not reproduce"
        text = (
            f"{told} {len(self.differences)} recorded outputs: largest difference {worst:.2e} "
            f"(legacy_projection={self.projection!r})"
        )
        if self.other_projection is not None:
            other = _other(self.projection)
            text += f"\n  with legacy_projection={other!r}: {self.other_projection:.2e}"
            if self.other_projection <= self.atol:
                text += ", so the checkpoint is of code that treated proj_attn so"
        return text


def verify_legacy(
    model: nn.Module,
    checkpoint: files.Source,
    recorded_outputs: Any,
    *,
    atol: float = 1e-6,
    legacy_projection: str = "identity",
    entry: str | None = None,
) -> LegacyReport:
    """Load a checkpoint of monai-generative into a copy of a model, and compare with outputs of the old one.

    The only check that does not rely on reading source code, and the one that finds what weights do not hold: other
    arguments, a transposed convolution, code that applied ``proj_attn``. The given model stays as it is.

    Args:
        model: the network of MONAI.
        checkpoint: see :func:`load_pretrained`.
        recorded_outputs: a :class:`Recording`, a mapping with its fields, a sequence of either, or a file of
            ``torch.save`` with one of these; tensors in double precision are compared in double precision.
        atol: absolute tolerance.
        legacy_projection: see :func:`load_pretrained`.
        entry: see :func:`load_pretrained`.

    Returns:
        The report.

    Raises:
        ArgumentError: nothing is recorded, or a recording has other fields.
    """
    recordings = _recordings(recorded_outputs)
    if not recordings:
        raise ArgumentError("recorded_outputs holds no recording: nothing could be compared.", path="recorded_outputs")
    differences, loaded = _differences(model, checkpoint, recordings, legacy_projection, entry)
    equal = max(differences) <= atol
    other = None
    if not equal:
        try:
            other = max(_differences(model, checkpoint, recordings, _other(legacy_projection), entry)[0])
        except NotConvertibleError:
            other = None
    return LegacyReport(equal, differences, atol, legacy_projection, other, loaded)


def _other(projection: str) -> str:
    return next(p for p in legacy.PROJECTIONS if p != projection)


def _recordings(given: Any) -> list[Recording]:
    if isinstance(given, (str, os.PathLike)):
        given = files.read(given)
    if isinstance(given, Recording):
        return [given]
    if isinstance(given, Mapping):
        fields = Recording.__dataclass_fields__
        unknown, absent = given.keys() - fields.keys(), {"inputs", "output"} - given.keys()
        if unknown or absent:
            raise ArgumentError(
                f"recorded_outputs has the fields {', '.join(map(str, given))}; a recording has inputs and output, and may have "
                "method and seed.",
                path="recorded_outputs",
            )
        inputs = given["inputs"]
        return [Recording(**{**given, "inputs": tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)})]
    if isinstance(given, Sequence) and not isinstance(given, str):
        return [recording for one in given for recording in _recordings(one)]
    raise ArgumentError(
        f"recorded_outputs is a {type(given).__name__}; pass a dpfix.Recording, a mapping, or a sequence of them.",
        path="recorded_outputs",
    )


def _differences(
    model: nn.Module, checkpoint: files.Source, recordings: list[Recording], projection: str, entry: str | None
) -> tuple[tuple[float, ...], LoadReport]:
    copied = plain_copy(unwrap(model)).eval()
    loaded = load_pretrained(copied, checkpoint, source=legacy.SOURCE, entry=entry, legacy_projection=projection)
    return tuple(_difference(copied, recording) for recording in recordings), loaded


def _difference(model: nn.Module, recording: Recording) -> float:
    floats = [t for t in pytree.tensors(recording.output) if t.is_floating_point()]
    if floats:
        model.to(floats[0].dtype)
    with rng_untouched(), torch.no_grad():
        if recording.seed is not None:
            torch.manual_seed(recording.seed)
        output = getattr(model, recording.method)(*recording.inputs)
    return compare_outputs(recording.output, output)

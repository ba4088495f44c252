"""Which releases a parameter holds: kept beside the parameters, for as long as these live, and found again in their copies.

A copy has other parameters. It is known by their values: those of every model that has released something are compared when a
call comes, and were noted when a private training ended and when a model in training was copied.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.utils.weak import WeakIdKeyDictionary

from dpfix.instrument.sharded import local
from dpfix.training.releases import Releases

SAMPLED = 256
"""Values of a parameter that are compared."""
SMALLEST = 8
"""Parameters with fewer values are not known again."""
MOST_NOTED = 20_000
"""Parameters whose values are remembered longer than they live; the oldest are forgotten first."""

Lineage = dict[str, Releases]
"""Trainings by name."""

_OF: Any = WeakIdKeyDictionary()  # the lineage of a parameter
_BEFORE: Any = WeakIdKeyDictionary()  # a digest of its values before it was trained privately for the first time
_NOTED: OrderedDict[bytes, Mapping[str, Releases]] = OrderedDict()


def remember(parameters: Iterable[nn.Parameter], releases: Iterable[Releases]) -> None:
    """These parameters hold what these trainings release.

    Args:
        parameters: parameters that are trained.
        releases: of trainings that go on, or have been.
    """
    releases = list(releases)
    for p in parameters:
        if p not in _OF:
            _BEFORE[p] = None if any(r.steps for r in releases) else _digest(p)
        _OF.setdefault(p, {}).update({r.name: r for r in releases})


def lineage_of(module: nn.Module) -> list[Releases]:
    """The trainings whose releases a model holds, in its own parameters or in those that it was copied from.

    Args:
        module: a model.

    Returns:
        Those that have released something, the earliest first. None if the model has the values that it had before its
        first private training: nothing of them is in it.
    """
    known = [p for p in module.parameters() if p in _OF]
    if known and all(_BEFORE[p] is not None and _digest(p) == _BEFORE[p] for p in known):
        return []
    found: Lineage = {}
    for p in known:
        found |= _released(_OF[p])
    others = [p for p in module.parameters() if p not in _OF]
    if others and (_NOTED or len(_OF)):
        note(list(_OF.keys()))
        for p in others:
            found |= _NOTED.get(_telling(p) or b"", {})
    return list(found.values())


def note(parameters: Iterable[nn.Parameter]) -> None:
    """Remember the present values of parameters that have released something, so that copies of them are known.

    Args:
        parameters: parameters; others are left out, and those that have the values with which they came.
    """
    for p in parameters:
        lineage = _released(_OF.get(p, {}))
        digest = _telling(p) if lineage else None
        if digest is not None and digest != _BEFORE[p]:
            _NOTED[digest] = {name: replace(r, stretches=list(r.stretches)) for name, r in lineage.items()}
            _NOTED.move_to_end(digest)
    while len(_NOTED) > MOST_NOTED:
        _NOTED.popitem(last=False)


def _released(lineage: Mapping[str, Releases]) -> Lineage:
    return {name: releases for name, releases in lineage.items() if releases.steps}


def _digest(parameter: nn.Parameter) -> bytes | None:
    """A digest of some of the values; ``None`` where there are none that could be compared."""
    if isinstance(parameter, UninitializedParameter) or parameter.is_meta or parameter.layout is not torch.strided:
        return None
    sampled = _sampled(parameter)
    kind = f"{tuple(parameter.shape)} {parameter.dtype}".encode()
    return hashlib.blake2b(kind + sampled.view(torch.uint8).numpy().tobytes(), digest_size=16).digest()


def _sampled(parameter: nn.Parameter) -> torch.Tensor:
    flat = local(parameter.detach()).flatten()
    return flat[:: max(1, len(flat) // SAMPLED)].cpu().contiguous()


def _telling(parameter: nn.Parameter) -> bytes | None:
    """The digest, if no other parameter would have it by chance, as new biases and scales have."""
    digest = _digest(parameter)
    if digest is None or local(parameter).numel() < SMALLEST:
        return None
    sampled = _sampled(parameter)
    return None if bool((sampled == sampled[0]).all()) else digest

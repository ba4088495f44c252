"""Which row of the model's arguments is whose: a loop may sort a batch, and must not repeat a sample in it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from dpfix.errors import ForeignBatchError
from dpfix.layout.calls import CallLayout
from dpfix.layout.rows import Rows
from dpfix.training.follow.delivery import Exchange
from dpfix.training.follow.step import NotFollowedError, tensors_of


@dataclass(frozen=True)
class Placement:
    """Where the samples of a repetition are.

    Attributes:
        rows: for every place in the repetition, the place of its sample in the step.
        before: the place of the sample that stays, in the step.
        after: its place in the repetition.
    """

    rows: tuple[int, ...]
    before: int
    after: int


def placement(base: Any, other: Any, layout: CallLayout, samples: int, exchange: Exchange) -> Placement | None:
    """Tell who is where in a call with other samples, by what the rows hold.

    Args:
        base: ``(args, kwargs)`` in the step.
        other: the same in the repetition.
        layout: how they carry the samples.
        samples: their number.
        exchange: which samples took the places of others.

    Returns:
        The placement; ``None`` if the arguments carry the samples in their order, or if rows cannot be recognised.

    Raises:
        ForeignBatchError: a sample is in several rows.
        NotFollowedError: samples have moved, and two that are equal cannot be told apart.
    """
    if exchange.extreme is not None:
        return None
    before, after = _rows(base, layout, samples), _rows(other, layout, samples)
    if not before or len(before) != len(after) or before == after:
        return None
    wanted, found = Counter(exchange.order)[exchange.keep], Counter(after)
    if len(found) > 2 or not all(row in before for row in found):
        return None  # a row has noise of its own, or holds what was computed from several
    if len(found) == 2 and set(found.values()) != {wanted, samples - wanted}:
        times = Counter(before)
        if any(times[mine] > 1 and mine != now for mine, now in zip(before, after, strict=True)):
            raise ForeignBatchError(
                "the loop hands samples of the batch to the model several times.",
                "Such a sample would be clipped and released once for every row.",
                "Train on the batches of the returned data_loader as they are; pass "
                "augmentation=dpfix.AugmentationMultiplicity(...) to make_private_safe for several views of a sample.",
                path="data_loader",
            )
        return None  # rows that were dropped by chance, or are equal for another reason, stay as they are
    if len(found) == 1 and before[exchange.keep] == after[exchange.keep]:
        return None  # two equal samples
    mine = [row for row, times in found.items() if times == wanted]
    if len(mine) != 1:
        raise NotFollowedError("two of the batch's samples are equal")
    if before[exchange.keep] == after[exchange.keep] == mine[0]:
        return None
    rows = tuple(before.index(row) for row in after)
    return Placement(rows, before.index(mine[0]), after.index(mine[0]))


def _rows(arguments: Any, layout: CallLayout, samples: int) -> list[bytes]:
    dims = dict(layout.inputs)
    parts: list[list[bytes]] = []
    for path, tensor in tensors_of(arguments):
        dim = dims.get(path)
        if dim is None or dim.counts or tensor.dim() <= dim.dim or tensor.shape[dim.dim] != samples * dim.rows:
            continue
        parts.append(_keys(tensor.detach(), Rows.of(dim, samples)))
    return [b"".join(row) for row in zip(*parts, strict=True)]


def _keys(tensor: torch.Tensor, rows: Rows) -> list[bytes]:
    """What every sample's rows hold, as bytes."""
    split = rows.split(tensor).contiguous().flatten(1).cpu()
    return [bytes(row.view(torch.uint8).numpy()) for row in split]

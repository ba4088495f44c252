"""What items of a data set were like, so that one that exchanges them is noticed where the items do not tell whose they are."""

from __future__ import annotations

import os
import time
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch

from dpfix.errors import USER_CODE_ERRORS, ArgumentError
from dpfix.instrument import pytree
from dpfix.instrument.rng import rng_untouched

MOST = 4096
"""Items that are remembered."""
ONE_IN = 16
"""Of so many deliveries of a remembered item one is looked at."""
BEFOREHAND = 32
"""Items that are read beforehand, where workers forget what they have seen."""
PATIENCE = 0.2
"""Seconds after which no further one is read."""
NUMBERS = 16
"""Numbers of an item that are compared."""


class SeenItems:
    """Some numbers of every item where it was delivered first, and the index at which these were.

    An item that is another one than before says nothing: transforms draw. One that is now, number by number, what another
    index was before, has changed places. Costs some 10 us for an item that is looked at.
    """

    def __init__(self) -> None:
        self._numbers: dict[int, tuple[float, ...]] = {}
        self._index: dict[tuple[float, ...], int] = {}

    def read(self, dataset: Any, indices: Sequence[int]) -> None:
        """Read some items beforehand."""
        begun = time.perf_counter()
        for k in range(min(BEFOREHAND, len(indices))):
            index = int(indices[k * len(indices) // min(BEFOREHAND, len(indices))])
            try:
                with rng_untouched():
                    self.moved_from(index, dataset[index])
            except USER_CODE_ERRORS:
                return  # told where the probe is read
            if time.perf_counter() - begun > PATIENCE:
                return

    def moved_from(self, index: int, item: Any) -> int | None:
        """The index at which an item was before, if that was another one; ``None`` if that cannot be said."""
        before = self._numbers.get(index)
        if before is None and len(self._numbers) >= MOST:
            return None
        if (
            before is not None and os.urandom(1)[0] % ONE_IN
        ):  # torch's generator begins alike in the workers of every pass
            return None
        now = _numbers(item)
        if now is None or now == before:
            return None
        if before is not None:
            return self._index.get(now)
        self._numbers[index] = now
        self._index.setdefault(now, index)
        return None


def _numbers(item: Any) -> tuple[float, ...] | None:
    """Numbers of an item by which it is known again; ``None`` if it has none that are unlikely in another one."""
    for _, leaf in pytree.leaves(item):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.layout is torch.strided:
            flat: Any = leaf.detach().reshape(-1)
        elif isinstance(leaf, np.ndarray) and leaf.dtype.kind == "f":
            flat = leaf.reshape(-1)
        else:
            continue
        found = tuple(flat[:: max(1, len(flat) // NUMBERS)][:NUMBERS].tolist())
        if len({number for number in found if number != _rounded(number)}) >= 3:
            return found
    return None


def _rounded(number: float) -> float:
    """The whole number next to it; itself if it is not finite."""
    return float(round(number)) if abs(number) < 2**52 else number


def changed_places(index: int, owner: Hashable, before: int, former: Hashable) -> ArgumentError:
    """The refusal of a data set that exchanges its items.

    Args:
        index: where the item is now.
        owner: whose that index is.
        before: where it was.
        former: whose that index is.

    Returns:
        The error.
    """
    return ArgumentError(
        f"privacy_unit: the item of index {index}, which belongs to {owner!r}, is now the one that index {before} had before, "
        f"which belongs to {former!r}.",
        "Whose an item is has to stay the same as long as the training lasts: a person's items would be clipped as another's.",
        "Name persons by a key of the items or a function of an item, or keep the data set in one order.",
        path="privacy_unit",
    )

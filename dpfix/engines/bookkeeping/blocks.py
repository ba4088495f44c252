"""How many samples are measured at a time: what fits into a processor's cache, or as much as keeps another device busy."""

from __future__ import annotations

from collections.abc import Sequence

import torch

CACHE = {"cpu": 2**20}
"""Numbers that stay near a processor, by kind of device."""
MOST_BLOCKS = 4
"""Parts in which a layer is measured, however many samples there are; by a processor, while a part has at most :data:`LARGE`."""
LARGE = 2**23
"""Numbers in memory that a processor takes at once instead of more parts."""
BUSY = 2**26
"""Numbers that any other device takes at once; it waits for whoever gives it little to do."""


def at_once(device: torch.device, numbers: int, samples: int) -> int:
    """How many samples are measured at a time, where only the norms of their gradients are needed.

    Args:
        device: where.
        numbers: that are needed for one sample.
        samples: how many there are.

    Returns:
        Samples.
    """
    if not by_sample(device):
        return max(1, BUSY // numbers)
    few = -(-samples // MOST_BLOCKS)
    return max(1, CACHE[device.type] // numbers, min(few, LARGE // numbers))


def near(device: torch.device) -> int:
    """How many numbers can be written and read again without waiting for memory, or are not worth to be counted."""
    return CACHE.get(device.type, BUSY)


def by_sample(device: torch.device) -> bool:
    """Whether a loop over the samples may be faster than one operation for all of them."""
    return device.type in CACHE


def parted(tensor: torch.Tensor, some: int) -> Sequence[torch.Tensor]:
    """Some rows at a time."""
    return (tensor,) if some >= len(tensor) else tensor.split(some)


def in_a_row(parts: list[torch.Tensor]) -> torch.Tensor:
    """Parts one after another."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)

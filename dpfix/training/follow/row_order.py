"""Whether the items of persons leave a collate function in the order in which they came, by which it is told whose a row is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch

MOST_SOUGHT = 32
"""Rows that are sought at the places of others, of those that are not at their own."""


def moved(
    whole: torch.Tensor,
    ones: Sequence[torch.Tensor],
    dim: int,
    close: Callable[[torch.Tensor, torch.Tensor], bool],
) -> tuple[bool, bool]:
    """Whether rows of a person are at the places of another one.

    Args:
        whole: a tensor of a batch of several persons.
        ones: the same of every person alone.
        dim: the dimension that carries the rows.
        close: whether two rows are equal, up to padding.

    Returns:
        Whether a row is not at its own place but at one of another person; and whether none is at its own. Nothing of that
        where rows are missing.
    """
    sizes = [one.shape[dim] if one.dim() > dim else -1 for one in ones]
    if whole.dim() <= dim or -1 in sizes or sum(sizes) != whole.shape[dim]:
        return False, False
    rows, elsewhere, kept, tried = whole.unbind(dim), False, 0, 0
    for start, one in zip(accumulate(sizes, initial=0), ones, strict=False):
        for k, row in enumerate(one.unbind(dim)):
            if close(rows[start + k], row):
                kept += 1
            elif not elsewhere and tried < MOST_SOUGHT:
                tried += 1
                others = (*rows[:start], *rows[start + one.shape[dim] :])
                elsewhere = any(close(other, row) for other in others)
    return elsewhere, not kept

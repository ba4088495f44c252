"""Sums, norms and errors of gradients, added up in double precision; sketches of gradients that are only compared.

A sketch is linear, so that sketches of gradients make sketches of their sums, and its norm is that of the gradient up to a
few percent: numbers get random signs and are added up in groups (AMS, Alon, Matias & Szegedy 1996; the signs of
CountSketch, Charikar, Chen & Farach-Colton 2002). A difference of two gradients is seen as large as it is, at a thousandth
of the memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch.utils._python_dispatch import _disable_current_modes

Gradients = dict[str, torch.Tensor]
_SIZES = (509, 521)
"""A sketch is made of two, with so many groups each: numbers that fall into one group of the one (a column of a weight whose rows
are a multiple of its size apart, two numbers that have changed places) are in several of the other."""
SKETCH = sum(_SIZES)
"""Numbers in a sketch. Its norm is off by ``1 / sqrt(2 * SKETCH)``, or 2 %, in the standard deviation."""
WHOLE = 2**14
"""Of a gradient that has no more numbers, all are kept: to make a sketch of it takes longer than it saves."""
_ROWS = 128  # of a table of signs, each for one number of every group
_ROUNDING = 1e-5  # relative difference of gradients in single precision, sums in another order included
_CHUNK = 2**18  # numbers that are taken to double precision at a time: fresh memory for more is slower than the sums


def weighted_sum(gradients: Sequence[Gradients], weights: Sequence[float]) -> Gradients:
    """``sum_i w_i g_i``, in single precision at least.

    Returns:
        The sum by parameter name.
    """
    out: Gradients = {}
    for gradient, weight in zip(gradients, weights, strict=True):
        for name, value in gradient.items():
            if name in out:
                out[name].add_(value, alpha=weight)
            else:
                out[name] = value.to(torch.promote_types(value.dtype, torch.float32), copy=True).mul_(weight)
    return out


def gap(a: torch.Tensor, b: torch.Tensor, factor: float = 1.0) -> float:
    """Euclidean norm of ``factor a - b``, added up in double precision.

    Returns:
        The norm.
    """
    pairs = zip(a.reshape(-1).split(_CHUNK), b.reshape(-1).split(_CHUNK), strict=True)
    return sum(_squares(x.to(y.dtype) * factor - y) for x, y in pairs) ** 0.5


@torch.no_grad()
def sketched(gradients: Mapping[str, torch.Tensor]) -> Gradients:
    """Sketches of gradients, which can be added up and compared with each other.

    Args:
        gradients: real numbers, by parameter name.

    Returns:
        The sketches, in single precision at least; a gradient of at most ``WHOLE`` numbers as it is.
    """
    with torch._C.DisableTorchFunction():  # where steps run in double precision, numbers would change their type
        return {name: g if g.numel() <= WHOLE else _sketch(g) for name, g in gradients.items()}


def _sketch(gradient: torch.Tensor) -> torch.Tensor:
    numbers = gradient.reshape(-1)
    return torch.cat([_in_groups(numbers, size) for size in _SIZES]).div_(math.sqrt(len(_SIZES)))


def _in_groups(numbers: torch.Tensor, size: int) -> torch.Tensor:
    dtype = torch.promote_types(numbers.dtype, torch.float32)
    signs, turns = _signs(size, dtype, numbers.device)
    total = torch.zeros(size, dtype=dtype, device=numbers.device)
    for number, block in enumerate(numbers.split(_ROWS * size)):
        rows = block.numel() // size
        part = (block[: rows * size].view(rows, size) * signs[:rows]).sum(0)
        rest = block[rows * size :]
        part[: rest.numel()] += rest * signs[-1, : rest.numel()]
        turn, shift = number % len(turns), number // len(turns)  # the signs begin anew, for other groups
        total += (part * turns[turn]).roll(shift)
    return total


@lru_cache(maxsize=16)
def _signs(size: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Random signs of the numbers of a block, and of the groups of every block."""
    with _disable_current_modes():  # they are kept, whatever fixes draws or makes no numbers at the moment
        generator = torch.Generator().manual_seed(size)
        signs = torch.randint(0, 2, (2, _ROWS, size), generator=generator, dtype=torch.int8, device="cpu")
        of_numbers, of_blocks = signs.to(device, dtype).mul_(2).sub_(1)
        return of_numbers, of_blocks


def _squares(t: torch.Tensor) -> float:
    t = t.double()
    return float(torch.dot(t, t))


def squared_norm(t: torch.Tensor) -> float:
    """Square of the Euclidean norm.

    Returns:
        The square, in double precision.
    """
    return sum(map(_squares, t.reshape(-1).split(_CHUNK)))


def norms_of(gradients: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Euclidean norm of the gradient of each parameter, by name, in double precision."""
    return {name: squared_norm(g) ** 0.5 for name, g in gradients.items()}


def norm_of(gradient: Mapping[str, torch.Tensor]) -> float:
    """Euclidean norm over all parameters.

    Returns:
        The norm, in double precision.
    """
    return math.hypot(*norms_of(gradient).values())


def relative_error(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> tuple[float, str]:
    """The largest error of one parameter, relative to its own norm or 5 % of the whole.

    Returns:
        The error, infinite if a parameter is missing or not finite, and the name of the parameter.
    """
    norms = norms_of(wanted)
    total = math.hypot(*norms.values())
    worst, where = 0.0, ""
    for name, value in wanted.items():
        got = found.get(name)
        if got is None:
            return float("inf"), name
        error = gap(got, value) / max(norms[name], 0.05 * total, 1e-12)
        if not error <= worst:
            worst, where = (error if error == error else float("inf")), name
    return worst, where


def unchanged(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> bool:
    """Whether two runs of one step on one sample differ by the rounding of sums in another order, if at all.

    Returns:
        Whether that is so. Sketches are not compared number by number: in each many others would hide a change of one.
    """
    return relative_error(found, wanted)[0] <= _ROUNDING

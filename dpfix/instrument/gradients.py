"""Sums, norms and errors of gradients, added up in double precision."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

Gradients = dict[str, torch.Tensor]
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


def _squares(t: torch.Tensor) -> float:
    t = t.double()
    return float(torch.dot(t, t))


def squared_norm(t: torch.Tensor) -> float:
    """Square of the Euclidean norm.

    Returns:
        The square, in double precision.
    """
    return sum(map(_squares, t.reshape(-1).split(_CHUNK)))


def norm_of(gradient: Mapping[str, torch.Tensor]) -> float:
    """Euclidean norm over all parameters.

    Returns:
        The norm, in double precision.
    """
    return sum(map(squared_norm, gradient.values())) ** 0.5


def relative_error(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> tuple[float, str]:
    """The largest error of one parameter, relative to its own norm or 5 % of the whole.

    Returns:
        The error, infinite if a parameter is missing or not finite, and the name of the parameter.
    """
    norms = {name: squared_norm(value) ** 0.5 for name, value in wanted.items()}
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

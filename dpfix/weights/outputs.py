"""Comparing outputs of modules: tensors in tuples, mappings or dataclasses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from dpfix.instrument import pytree


@dataclass(frozen=True)
class Difference:
    """A place where two modules part.

    Attributes:
        path: module path in ``a``; empty for the model's own output.
        other_path: module path in ``b``.
        mode: ``"eval"`` or ``"train"``.
        call: how often the module had been called before in this pass.
        output: which part of its output, for example ``[0]`` or ``['mu']``.
        size: largest absolute difference; infinite if the outputs cannot be compared.
        scale: largest absolute value of ``a``'s output there.
        reason: what differs other than the values: shape, structure, number of calls.
    """

    path: str
    other_path: str
    mode: str
    call: int
    output: str
    size: float
    scale: float
    reason: str = ""

    def __str__(self) -> str:
        layer = f"`{self.path}`" if self.path else "the model's output"
        if self.other_path != self.path:
            layer += f" (`{self.other_path}` in the other)"
        part = f", output {self.output}" if self.output else ""
        call = f", call {self.call + 1}" if self.call else ""
        what = self.reason or f"largest difference {self.size:.2e} at values up to {self.scale:.2e}"
        return f"{layer} in {self.mode}(){part}{call}: {what}"


def compare_outputs(a: Any, b: Any) -> float:
    """Largest absolute difference of two outputs: tensors in tuples, mappings or dataclasses.

    Returns:
        The difference; infinite if structure or shapes differ, or a value is not a number in only one of them.

    >>> compare_outputs((torch.ones(2), {"mu": torch.zeros(3)}), (torch.ones(2), {"mu": torch.full((3,), 0.5)}))
    0.5
    """
    return max((d.size for _, d in compare_leaves(a, b, 0.0, 0.0)), default=0.0)


def compare_leaves(a: Any, b: Any, atol: float, rtol: float) -> Iterator[tuple[bool, Difference]]:
    """Compare every leaf of two outputs; ``atol`` and ``rtol`` as in :func:`dpfix.verify_equivalence`.

    Yields:
        Whether the leaf agrees, and by how much it does not.
    """
    a = a if isinstance(a, dict) and all(isinstance(k, tuple) for k in a) else dict(pytree.leaves(a))
    b = b if isinstance(b, dict) and all(isinstance(k, tuple) for k in b) else dict(pytree.leaves(b))
    if a.keys() != b.keys():
        parts = sorted(_shown(path) or "the output" for path in a.keys() ^ b.keys())
        yield False, Difference("", "", "", 0, "", math.inf, 0.0, f"only one of them has {', '.join(parts[:3])}")
        return
    for path in a:
        equal, size, scale, reason = _leaf(a[path], b[path], atol, rtol)
        yield equal, Difference("", "", "", 0, _shown(path), size, scale, reason)


def _shown(path: pytree.Path) -> str:
    return "".join(f"[{key!r}]" for key in path)


def _leaf(a: Any, b: Any, atol: float, rtol: float) -> tuple[bool, float, float, str]:
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        same = isinstance(a, torch.Tensor) == isinstance(b, torch.Tensor) and (a is b or a == b)
        return bool(same), 0.0 if same else math.inf, 0.0, "" if same else f"{_named(a)} and {_named(b)}"
    if a.shape != b.shape:
        return False, math.inf, 0.0, f"shapes {list(a.shape)} and {list(b.shape)}"
    if a.numel() == 0:
        return True, 0.0, 0.0, ""
    x, y = (t.detach().to("cpu", torch.complex128 if t.is_complex() else torch.float64) for t in (a, b))
    if bool((torch.isnan(x) | torch.isnan(y)).any()):
        return False, math.inf, float(x.abs().nan_to_num().max()), "not a number"
    gap = torch.where(x == y, torch.zeros((), dtype=torch.float64), (x - y).abs())
    agrees = bool((gap <= atol + rtol * x.abs()).all())
    return agrees, float(gap.max()), float(x.abs().max()), ""


def _named(leaf: Any) -> str:
    return "a tensor" if isinstance(leaf, torch.Tensor) else repr(leaf)[:40]

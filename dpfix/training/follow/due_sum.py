"""What an engine makes of the very batch, against ordinary autograd on a plain copy of the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from random import SystemRandom
from typing import Any

import torch

from dpfix.audit.reference import factor
from dpfix.instrument.clipping import Scheme
from dpfix.instrument.gradients import Gradients, norm_of
from dpfix.instrument.precision import exact_products, products_are_rounded
from dpfix.plan import Plan
from dpfix.training.follow.calls import ModelCall
from dpfix.training.follow.model import PlainModel
from dpfix.training.follow.step import ROUGH

_NORM = 1e-2
_SUM = 2e-2
_ROUNDING = 4
"""The engine may be so many times further from the plain model than that is from itself without TF32."""
_GROUPS = 4
"""So many groups of parameters, others in every step, are compared: each takes a backward pass of its own."""


def wrong_sum(
    model: PlainModel, plan: Plan, clipped: Gradients, norms: torch.Tensor, clip_norm: float, chosen: Sequence[int]
) -> str:
    """Why a clipped sum is not the sum of clipped per-sample gradients; empty if it is, or if it cannot be told.

    Args:
        model: the plain model on the step.
        plan: for the scale of a sample's gradient, and how it is clipped.
        clipped: the clipped sum by parameter name.
        norms: norms of the samples' gradients as the engine has them, shape ``[samples, groups]``.
        clip_norm: the clip norm C of all parameters together.
        chosen: samples whose norms are compared with the plain model's.

    Returns:
        The reason, with factors and no values of the data.
    """
    due = None if any(map(_has_no_rows, model.step.calls, model.step.gradients)) else _Due.of(model)
    if due is None:
        return ""
    scale, scheme = plan.scale(len(norms), model.counts), plan.clipping
    scales = scale.tolist() if isinstance(scale, torch.Tensor) else [float(scale)] * len(norms)
    values = norms.tolist()
    if not all(math.isfinite(v) for of_one in values for v in of_one):
        return ""  # there are checks of their own for that
    groups = [[list(clipped)[i] for i in of] for of in scheme.members(list(clipped))]
    for i in {i % len(values) for i in chosen}:
        alone, exactly = due.gradients([s * (j == i) for j, s in enumerate(scales)])
        for names, value, most in zip(groups, values[i], norms.amax(0).tolist(), strict=True):
            norm, exact = (norm_of({n: of[n] for n in names}) for of in (alone, exactly))
            allowed = _NORM * max(norm, _NORM * most, 1e-12) + _ROUNDING * abs(norm - exact)
            if not abs(value - norm) <= allowed:
                return f"the norm of one sample's gradient is {value / max(norm, 1e-30):.3g} times what it is without an engine"
    for g in SystemRandom().sample(range(len(groups)), min(_GROUPS, len(groups))):
        bound = scheme.shares[g] * clip_norm
        factors = [s * factor(scheme, bound, of_one[g]) for s, of_one in zip(scales, values, strict=True)]
        wanted, exactly = due.gradients(factors)
        for name in groups[g]:
            error, rounding = (_error(of[name], wanted[name], bound) for of in (clipped, exactly))
            if not error <= _SUM + _ROUNDING * rounding:
                return f"the clipped sum of `{name}` differs by {error:.1e} times the clip norm from the one without an engine"
    return ""


class _Due:
    """The gradients of a step by ordinary autograd, as the script has torch round products, and rounded less.

    Args:
        model: the plain model on the step.
        graph: its outputs.
        exact: its outputs without TF32; ``None`` where products are not rounded so anyway.
    """

    def __init__(self, model: PlainModel, graph: Any, exact: Any) -> None:
        self._model, self._graph, self._exact = model, graph, exact

    @classmethod
    def of(cls, model: PlainModel) -> _Due | None:
        """The gradients, or ``None`` where the model's outputs are not those of the step."""
        rounded = products_are_rounded()
        graph = model.graph()
        if not model.is_of_step(graph, ROUGH if rounded else None):
            return None
        if not rounded:
            return cls(model, graph, None)
        with exact_products():
            exact = model.graph()
        return cls(model, graph, exact if model.is_of_step(exact, ROUGH) else None)

    def gradients(self, of_each: Sequence[float]) -> tuple[Gradients, Gradients]:
        """The weighted sum of the samples' gradients, and the same rounded less.

        Args:
            of_each: one number for each that is clipped.

        Returns:
            Both by parameter name.
        """
        weights = self._model.weights(of_each)
        found = self._model.gradient(self._graph, weights)
        if self._exact is None:
            return found, found
        with exact_products():
            return found, self._model.gradient(self._exact, weights)


def _has_no_rows(call: ModelCall, gradients: Sequence[torch.Tensor | None]) -> bool:
    """Whether a gradient is not known, or is that of a loss which the model has computed itself."""
    pairs = zip(call.outputs, gradients, strict=True)
    return any(g is None or (o.dim is None and bool(g.any())) for o, g in pairs)


def _error(found: torch.Tensor, wanted: torch.Tensor, clip_norm: float) -> float:
    size = max(float(torch.linalg.vector_norm(wanted.double())), clip_norm)
    return float(torch.linalg.vector_norm(found.double() - wanted.double())) / size


def norms_left_on(parameters: Mapping[str, Any], scheme: Scheme) -> torch.Tensor | None:
    """Norms of the per-sample gradients that an engine has left on the parameters, shape ``[samples, groups]``."""
    found = [getattr(p, "grad_sample", None) for p in parameters.values()]
    left = [g.detach() for g in found if isinstance(g, torch.Tensor)]
    if not left or len(left) < len(found):
        return None
    return scheme.norms(list(parameters), left)

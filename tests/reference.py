"""An independent reference: per-sample gradients from batches of one, by ordinary autograd.

Written for the tests, from the definition of DP-SGD (Abadi et al. 2016). It knows nothing of dpfix's own reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Gradients = dict[str, Tensor]
Step = Callable[[nn.Module, Any], Tensor]

OPACUS_EPSILON = 1e-6  # added to every norm by Opacus's optimizer


def gradients_one_by_one(model: nn.Module, step: Step, singles: Sequence[Any]) -> list[Gradients]:
    """The gradient of every sample's loss, each from its own forward and backward pass.

    Args:
        model: the plain model; parameters and buffers are as before afterwards.
        step: from model and batch to loss.
        singles: batches of one sample.

    Returns:
        One mapping from parameter name to gradient for every sample; zeros where no gradient arrives.
    """
    found = []
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for batch in singles:
        grads = torch.autograd.grad(step(model, batch), list(trainable.values()), allow_unused=True)
        found.append({
            n: torch.zeros_like(p) if g is None else g.detach()
            for (n, p), g in zip(trainable.items(), grads, strict=True)
        })
    return found


def norm(gradients: Gradients) -> float:
    """Euclidean norm over all parameters together."""
    return float(sum(g.double().square().sum() for g in gradients.values()) ** 0.5)


def clipped_sum(samples: Sequence[Gradients], clip_norm: float) -> Gradients:
    """``sum_i min(1, C / |g_i|) g_i``."""
    total = {n: torch.zeros_like(g, dtype=torch.float64) for n, g in samples[0].items()}
    for gradients in samples:
        factor = min(1.0, clip_norm / (norm(gradients) + OPACUS_EPSILON))
        for name, g in gradients.items():
            total[name] += factor * g.double()
    return total


def clip_norms(samples: Sequence[Gradients]) -> dict[str, float]:
    """One norm that clips every sample, one that clips about half of them, one that clips none."""
    norms = sorted(norm(g) for g in samples)
    return {"small": 0.05 * norms[0], "middle": norms[len(norms) // 2], "huge": 10 * norms[-1]}


def relative_error(found: Gradients, wanted: Gradients) -> float:
    """Largest error of a parameter, relative to its own norm (or 2 % of the norm of everything)."""
    whole = norm(wanted)
    return max(
        float((found[n].double() - w).norm()) / max(float(w.norm()), 0.02 * whole, 1e-12) for n, w in wanted.items()
    )

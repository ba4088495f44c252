"""The privacy settings of a call in words, for the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpfix.instrument.clipping import together
from dpfix.plan import Plan
from dpfix.sampling.people import People, people_of
from dpfix.sampling.rate import batch_size, index_set, largest_batch, sample_rate
from dpfix.scan.request import Request


def settings(request: Request, noise_multiplier: float | None, plan: Plan, *, secure: bool) -> dict[str, str]:
    """The privacy settings in force.

    Args:
        request: the call.
        noise_multiplier: ``None`` in a diagnosis.
        plan: how gradients are clipped, and batches delivered.
        secure: whether the noise is cryptographic.

    Returns:
        What they are, by name.
    """
    loader, privacy, people = request.data_loader, request.privacy, people_of(request.data_loader)
    several = {} if request.views == 1 else {"views per sample": str(request.views)}
    if request.ranks.size > 1:
        who = "each adds the noise to its part of the parameters" if request.ranks.sharded else "rank 0 adds the noise"
        several["ranks"] = f"{request.ranks.size}, each works on its part of every batch; {who}"
    if plan.physical is not None:
        several["physical batches"] = f"at most {plan.physical} samples at a time; a batch is released once, as a whole"
    return {
        "noise multiplier": "not set" if noise_multiplier is None else f"{noise_multiplier:g}",
        "clip norm": _clip_norm(privacy.max_grad_norm),
        "clipping": plan.clipping.words(),
        **({"samples": str(len(index_set(loader)))} if people is None else _persons(people)),
        "sampling": _sampling(request),
        "expected batch size": f"{batch_size(loader):g}" + ("" if people is None else " persons"),
        "loss reduction": privacy.loss_reduction,
        **several,
        "randomness": _randomness(request, secure),
    }


def _persons(people: People) -> dict[str, str]:
    """Who is drawn, in words."""
    most = "all" if people.most is None else f"at most {people.most}, drawn at random"
    return {
        "persons": f"{len(people)} ({people.describe()}), by {people.words}",
        "items of a person in a batch": f"{most}; their gradients are averaged before clipping",
    }


def _clip_norm(value: Any) -> str:
    """The clip norm, or all of them and what they bound together."""
    if isinstance(value, Mapping):
        return f"{dict(value)}, together {together(list(value.values())):.6g}"
    return str(value)


def _sampling(request: Request) -> str:
    """How batches are drawn, in words."""
    loader, rate = request.data_loader, sample_rate(request.data_loader)
    return {
        "poisson": f"Poisson, rate {rate:.6g}",
        "truncated": f"Poisson, rate {rate:.6g}, at most {largest_batch(rate, len(index_set(loader)))} samples",
        "shuffle": "the loader's own order, every sample once a pass; a pass is accounted as one release",
    }.get(request.privacy.sampling, "the loader's own; every step is accounted in full")


def _randomness(request: Request, secure: bool) -> str:
    """Where noise and draws come from, in words."""
    if secure:
        return "a cryptographic generator"
    if not request.privacy.reproducible:
        return "the training's own generators, seeded by the operating system"
    given = "seed" if request.privacy.seed is not None else "noise_generator"
    return f"from {given}=, so that the noise can be computed again: it protects nobody from whoever knows that seed"

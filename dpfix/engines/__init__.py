"""The engines: ways to obtain the per-sample gradients of one step."""

from __future__ import annotations

from collections.abc import Mapping

from dpfix.engines import bookkeeping
from dpfix.engines.base import Engine, Handle, Verdict
from dpfix.engines.opacus.expanded_weights import ExpandedWeights
from dpfix.engines.opacus.hooks import OpacusHooks
from dpfix.engines.opacus.no_op import ByHand
from dpfix.engines.per_sample.microbatch import Microbatch
from dpfix.engines.per_sample.vmap import Vmap
from dpfix.engines.undecided import Undecided
from dpfix.plan import Plan

ENGINES: Mapping[str, Engine] = {
    "bookkeeping": bookkeeping.ENGINE,
    "vmap": Vmap(),
    "hooks": OpacusHooks("hooks"),
    "functorch": OpacusHooks("functorch"),
    "microbatch": Microbatch(),
}
"""Engines by name, the ones that are usually fastest first."""

BY_HAND = ByHand()
"""For scripts that fill ``grad_sample`` themselves; it cannot be audited."""

BY_NAME: Mapping[str, Engine] = {**ENGINES, "ew": ExpandedWeights(), BY_HAND.name: BY_HAND}
"""Every engine that can be asked for; those that are not in :data:`ENGINES` are never chosen by themselves."""

FOR_SHARDS = next(name for name, engine in ENGINES.items() if engine.takes_shards)
"""The engine of models that are spread over processes."""

UNDECIDED = Undecided()
"""Where the first real call is to decide; nobody can ask for it."""


def engine_of(plan: Plan) -> Engine:
    """The engine that a plan names."""
    return BY_NAME[plan.engine] if plan.engine else UNDECIDED


__all__ = ["BY_HAND", "BY_NAME", "ENGINES", "FOR_SHARDS", "UNDECIDED", "Engine", "Handle", "Verdict", "engine_of"]

"""The engines: ways to obtain the per-sample gradients of one step."""

from __future__ import annotations

from collections.abc import Mapping

from dpfix.engines.base import Engine, FlatClipping, Handle, Verdict
from dpfix.engines.bookkeeping import Bookkeeping
from dpfix.engines.by_hand import ByHand
from dpfix.engines.microbatch import Microbatch
from dpfix.engines.opacus_hooks import OpacusHooks

ENGINES: Mapping[str, Engine] = {
    "bookkeeping": Bookkeeping(),
    "hooks": OpacusHooks("hooks"),
    "functorch": OpacusHooks("functorch"),
    "microbatch": Microbatch(),
}
"""Engines by name, the ones that are usually fastest first."""

BY_HAND = ByHand()
"""For scripts that fill ``grad_sample`` themselves; never chosen, only asked for as ``"no_op"``."""

__all__ = ["BY_HAND", "ENGINES", "Engine", "FlatClipping", "Handle", "Verdict"]

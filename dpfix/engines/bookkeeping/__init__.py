"""Book-keeping: one forward, one backward, and no gradient computed that private training does not need.

The backward pass of the script's own loss leaves, for every layer call, what its per-sample gradients are made of in
the cheapest form: per-sample norms come from it first, and the clipped sum from one ordinary weight gradient with the
clip factors on one of its operands (Bu et al., "Differentially Private Optimization on Large Foundation Models at
Small Cost", 2023).

:data:`register` lets a rule of the user's own compute a layer of the user's own; see :meth:`Bookkeeping.register`.
"""

from dpfix.engines.bookkeeping.contributions import Contribution, Kept
from dpfix.engines.bookkeeping.engine import Bookkeeping
from dpfix.engines.bookkeeping.layer_rule import LayerCall, LayerRule
from dpfix.layout.rows import Rows

ENGINE = Bookkeeping()
"""The engine that private training uses."""

register = ENGINE.register

__all__ = ["ENGINE", "Bookkeeping", "Contribution", "Kept", "LayerCall", "LayerRule", "Rows", "register"]

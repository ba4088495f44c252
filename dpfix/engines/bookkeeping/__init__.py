"""Book-keeping: one forward, one backward, and no gradient computed that private training does not need.

The backward pass of the script's own loss leaves, for every layer call, what its per-sample gradients are made of in
the cheapest form: per-sample norms come from it first, and the clipped sum from one ordinary weight gradient with the
clip factors on one of its operands (Bu et al., "Differentially Private Optimization on Large Foundation Models at
Small Cost", 2023).
"""

from dpfix.engines.bookkeeping.engine import Bookkeeping

__all__ = ["Bookkeeping"]

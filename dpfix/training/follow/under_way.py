"""Delivered batches on which no step was made yet, and what comes from them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from dpfix.instrument import pytree
from dpfix.training.follow.calls import LIKE, Call, ModelCall, overwrites, parts_of
from dpfix.training.follow.delivery import BatchLayout, Delivery, Source, Sources, delivered

MOST_DELIVERIES = 64
"""Deliveries without a step that are remembered while nothing shows whether the script still has them."""
MOST_AHEAD = 2
"""Deliveries without a step before the last one for which what was done to them is kept."""

Origins = dict[int, set[Delivery]]
"""The deliveries that a tensor comes from, by its id."""


class UnderWay(OrderedDict[Delivery, dict[int, Source]]):
    """Batches that were delivered, oldest first, each with its parts by identity.

    Args:
        layout: how the loader's batches carry their samples.

    Attributes:
        layout: see above.
        sources: parts of all of them, by identity.
    """

    def __init__(self, layout: BatchLayout) -> None:
        super().__init__()
        self.layout, self.sources = layout, Sources()

    def add(self, batch: Any, draw: Any) -> Delivery | None:
        """A batch is delivered.

        Returns:
            It; ``None`` if it does not look like the batches of this loader.
        """
        found = delivered(batch, self.layout)
        if found is None:
            return None
        delivery, sources = found
        delivery.draw = draw
        self[delivery] = sources
        self.sources.update(sources)
        return delivery

    def drop(self, deliveries: Collection[Delivery]) -> None:
        """Nothing is known any more as a part of these."""
        for delivery in tuple(deliveries):
            for key, source in self.pop(delivery, {}).items():
                if self.sources.get(key) is source:
                    del self.sources[key]

    def drop_old(self) -> None:
        """The script has let go of some; if all are alive, there are not more than a fixed number."""
        gone = [delivery for delivery in self if not delivery.alive]
        self.drop(gone or list(self)[: max(0, len(self) - MOST_DELIVERIES)])

    def written(self, deliveries: Collection[Delivery], before: Mapping[int, torch.Tensor]) -> bool:
        """Whether the script has written into what was delivered, itself or by NumPy.

        Args:
            deliveries: of what.
            before: what tensors held before, by identity.

        Returns:
            Whether any tensor holds something else now.
        """
        things = [source.held() for source in self.sources.values() if source.delivery in deliveries]
        tensors = [t for t in things if isinstance(t, torch.Tensor) and id(t) in before]
        return any(not torch.equal(before[id(t)], t) for t in tensors)

    def origins(self, calls: Sequence[Call | ModelCall]) -> Origins:
        """For every tensor that comes from delivered batches by some calls, these deliveries."""
        found: Origins = {k: {s.delivery} for k, s in self.sources.items() if s.held() is not None}
        nothing: set[Delivery] = set()
        for call in calls:
            from_ = origin_of((call.args, call.kwargs), found)
            if not from_ or getattr(call, "name", "") in LIKE:
                continue
            for t in pytree.tensors((call.result, call.args[:1]) if overwrites(call) else call.result):
                found[id(t)] = found.get(id(t), nothing) | from_
        return found


def origin_of(tree: Any, origins: Origins) -> set[Delivery]:
    """The deliveries that anything in some arguments comes from."""
    return {delivery for part in parts_of(tree) for delivery in origins.get(id(part), ())}

"""Which steps are checked."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

import numpy as np
import torch

from dpfix.instrument import pytree
from dpfix.training.follow.delivery import Delivery

FIRST = 3
"""Steps with at least two samples that are checked at the beginning."""
SHARE = 0.02
"""Share of the training time that checks of later steps take, unless the call says otherwise."""


class Agenda:
    """Chooses the steps that are checked: the first, those that are new in kind, and others by chance.

    Args:
        share: share of the training time for the others.

    Attributes:
        checked: number of steps that were checked.
        draw: random numbers for choices; nobody can foresee them.
    """

    def __init__(self, share: float = SHARE) -> None:
        self.checked = 0
        self.draw = Random()  # seeded by the operating system
        self._share = share
        self._known: set[Any] = set()
        self._once_more = False
        self._start = 0.0
        self._steps, self._tried, self._spent = 0, 0, 0.0

    def due(self, seen: set[Any]) -> bool:
        """Whether a step is checked.

        Args:
            seen: what tells it from steps of other kinds.

        Returns:
            True for the first steps, for one in which anything is seen for the first time, for the one after a step that was
            chosen by chance (what it keeps shows there), and by chance.
        """
        self._start = self._start or time.perf_counter()  # what a script does before it trains is no time of training
        self._steps += 1
        new = not seen <= self._known
        self._known |= seen
        chosen = self._tried < FIRST or new or self._once_more
        self._once_more = not chosen and self.draw.random() < self.chance
        self._tried += chosen or self._once_more
        return chosen or self._once_more

    @property
    def chance(self) -> float:
        """Probability with which a step is checked that is like others: what the share of the time allows."""
        if not self._spent:
            return 1.0 if self._share else 0.0
        step = (time.perf_counter() - self._start - self._spent) / max(1, self._steps - 1)  # without checks
        return min(1.0, self._share * step / (2 * self._spent / max(1, self._tried)))

    @contextmanager
    def check(self) -> Iterator[None]:
        """A part of a step is being checked; its time is remembered."""
        before = time.perf_counter()
        try:
            yield
        finally:
            self._spent += time.perf_counter() - before

    def passed(self) -> None:
        """A step was checked, and nothing was found."""
        self.checked += 1

    def steps_until_found(self, confidence: float = 0.999) -> int:
        """After how many steps a coupling that shows in every step is found with this probability.

        A step is checked with probability p, independently of the others: ``(1 - p)^k <= 1 - confidence``.

        Returns:
            The smallest such k.
        """
        p = self.chance
        if p >= 1:
            return 1
        return math.ceil(math.log(1 - confidence) / math.log1p(-p)) if p > 0 else 2**31


MOST_NUMBERS = 4096
"""Numbers of an entry of the batch in which labels are looked for."""
MOST_VALUES = 64
"""Different labels of one entry of the batch that are told apart; with more of them only how large the extremes are is."""
MOST_LABELS = 32
"""Different numbers among several per sample, most of which come once, that may be labels; more are ids of words."""


class Novelty:
    """What a batch holds that none before had: labels, missing values."""

    def __init__(self) -> None:
        self._values: dict[Any, set[float]] = defaultdict(set)

    def of(self, delivery: Delivery) -> set[Any]:
        """What tells this batch from others.

        Args:
            delivery: a delivered batch.

        Returns:
            What entry it is, and a label, how large values are (-999 marks missing ones), or that values are missing.
        """
        found: set[Any] = set()
        for path, leaf in pytree.leaves(delivery.batch):
            place = tuple(part for part in path if not isinstance(part, int) or len(path) == 1)
            if isinstance(leaf, (bool, int)):
                found |= self._label(place, float(leaf))
            elif isinstance(leaf, (torch.Tensor, np.ndarray)):
                tensor = leaf if isinstance(leaf, torch.Tensor) else torch.from_numpy(leaf)
                found |= self._tensor(place, tensor.detach())
        return found

    def _label(self, place: Any, value: float) -> set[Any]:
        known = self._values[place]
        if len(known) <= MOST_VALUES:
            known.add(value)
            return {(place, value)}
        return set()

    def _tensor(self, place: Any, tensor: torch.Tensor) -> set[Any]:
        if not tensor.numel() or tensor.is_complex():
            return set()
        few = tensor.numel() <= MOST_NUMBERS and len(self._values[place]) <= MOST_VALUES
        if few and not tensor.is_floating_point():
            values = tensor.unique()
            if tensor.dim() < 2 or len(values) <= max(MOST_LABELS, tensor.numel() // 8):
                return {pair for value in values.tolist() for pair in self._label(place, float(value))}
        ends = [float(end) for end in tensor.aminmax()]
        if not all(map(math.isfinite, ends)):
            return {(place, "missing")}
        if not tensor.is_floating_point() and ends[0] > 0:
            ends[0] = 1.0  # the smallest of many ids says no more than that none is of padding or ignored
        return {(place, number, end > 0, math.frexp(end)[1] // 2) for number, end in enumerate(ends)}

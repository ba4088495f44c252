"""Accounting with privacy loss distributions, by Google's ``dp-accounting``."""

from __future__ import annotations

import math
from collections import Counter
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from opacus.accountants import create_accountant
from opacus.accountants.accountant import IAccountant
from typing_extensions import override

from dpfix.errors import ArgumentError
from dpfix.scan.arguments import check_choice
from dpfix.training.epsilon import LARGEST_NOISE, MOST_ENTRIES, Entry, coarser, renyi_epsilon

ACCOUNTANTS = ("prv", "rdp", "gdp", "pld")
"""Names of accountants."""
INTERVAL = 1e-4
"""Width of the cells of a distribution; the library's default."""
MOST_CELLS = 1_000_000
"""Cells of a distribution at most; beyond it they get wider, which makes epsilon larger and never smaller."""
SMALLEST_TAIL = 1e-22
"""Probability beyond which the library cuts a distribution off, and counts what it cuts off into delta."""


class PLDAccountant(IAccountant):
    """An accountant for Opacus's engines that composes privacy loss distributions.

    The library rounds upwards wherever it rounds, so that epsilon is an upper bound: Doroshenko et al. 2022,
    https://arxiv.org/abs/2207.04380.

    Raises:
        ArgumentError: ``dp-accounting`` is not installed.
    """

    def __init__(self) -> None:
        super().__init__()
        if find_spec("dp_accounting") is None:
            raise ArgumentError(
                "accountant='pld' needs the package dp-accounting, which is not installed.",
                "It computes the privacy loss distributions.",
                "pip install 'dpfix[accounting]', or use accountant='prv'.",
                path="accountant",
            )

    @override
    def step(self, *, noise_multiplier: float, sample_rate: float) -> None:
        last = self.history[-1] if self.history else None
        if last is not None and tuple(last[:2]) == (noise_multiplier, sample_rate):
            self.history[-1] = (noise_multiplier, sample_rate, last[2] + 1)
        else:
            self.history.append((noise_multiplier, sample_rate, 1))

    @override
    def get_epsilon(self, delta: float, **options: Any) -> float:
        if any(not noise > 0 for noise, *_ in self.history):
            return math.inf
        return pld_epsilon(self.history, delta) if self.history else 0.0

    @override
    def __len__(self) -> int:
        return len(self.history)

    @classmethod
    @override
    def mechanism(cls) -> str:
        return "pld"


def pld_epsilon(history: list[Entry], delta: float) -> float:
    """An upper bound on epsilon from privacy loss distributions.

    Args:
        history: noise multiplier, sampling rate and number of steps of every entry, with noise above 0.
        delta: probability that the bound does not hold.

    Returns:
        Epsilon; infinite where ``delta`` is smaller than what the distributions are cut off at.
    """
    library: Any = import_module("dp_accounting.pld.privacy_loss_distribution")
    capped = [(min(noise, LARGEST_NOISE), rate, steps) for noise, rate, steps in history]
    entries = capped if len(capped) <= MOST_ENTRIES else coarser(capped)
    certain, by_chance = 0.0, Counter[tuple[float, float]]()
    for noise, rate, steps in entries:
        if rate >= 1:
            certain += steps / noise**2  # Gaussian mechanisms in a row are one, with the inverse variances added up
        else:
            by_chance[noise, rate] += steps
    width = max(INTERVAL, 2 * _largest_loss(capped) / MOST_CELLS)
    composed = library.identity(value_discretization_interval=width)
    if certain:
        composed = composed.compose(library.from_gaussian_mechanism(certain**-0.5, value_discretization_interval=width))
    for (noise, rate), steps in by_chance.items():
        step = library.from_gaussian_mechanism(noise, sampling_prob=rate, value_discretization_interval=width)
        composed = composed.compose(step.self_compose(steps))
    return max(0.0, float(composed.get_epsilon_for_delta(delta)))


def _largest_loss(history: list[Entry]) -> float:
    """What a privacy loss stays below, for the number of cells."""
    single = max(0.5 / noise**2 + 10 / noise for noise, *_ in history)
    return max(single, renyi_epsilon(history, SMALLEST_TAIL))


def new_accountant(name: Any) -> IAccountant:
    """An accountant by name.

    Args:
        name: one of ``ACCOUNTANTS``.

    Returns:
        A new one.

    Raises:
        ArgumentError: there is none of that name.
    """
    check_choice("accountant", name, ACCOUNTANTS, "Leave it out: 'prv' is the default.")
    return PLDAccountant() if name == "pld" else create_accountant(mechanism=name)

"""Index set, batch size and sampling rate of a loader."""

from __future__ import annotations

import math
from typing import Any

from scipy.stats import binom
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler

from dpfix.report.finding import Finding


def index_set(loader: DataLoader[Any]) -> list[int]:
    """The indices that a loader draws from, if the data-loader rule accepts its sampler.

    Returns:
        The sampler's own index set (``SubsetRandomSampler``), or all indices of the dataset.
    """
    batches = loader.batch_sampler
    sampler = batches if hasattr(batches, "indices") else getattr(batches, "sampler", None)
    indices = getattr(sampler, "indices", None)
    if indices is None:
        return list(range(len(loader.dataset)))  # type: ignore[arg-type]
    return [int(i) for i in indices]


def batch_size(loader: DataLoader[Any]) -> float:
    """The batch size a loader asks for, at most the number of samples.

    Returns:
        The size; for a loader that is already Poisson, the expected size; on several ranks, that of all together: a
        ``DistributedSampler`` says that the loader's size is that of one rank.
    """
    batches = loader.batch_sampler
    population = len(index_set(loader))
    if hasattr(batches, "sample_rate"):
        return batches.sample_rate * population  # type: ignore[union-attr]
    size = getattr(batches, "batch_size", None)
    if size is None:  # only without Poisson sampling: a batch sampler of the user's own
        size = population / max(1, len(loader))
    sampler = getattr(batches, "sampler", None)
    replicas = sampler.num_replicas if isinstance(sampler, DistributedSampler) else 1
    return min(size * replicas, population)


def sample_rate(loader: DataLoader[Any]) -> float:
    """Probability with which every sample enters a batch: batch size over the size of the index set.

    Opacus takes ``1 / len(loader)``, which is off when the last batch is dropped or not full.

    Returns:
        A number in (0, 1].
    """
    return batch_size(loader) / len(index_set(loader))


BY_CHANCE = frozenset({"poisson", "truncated"})
"""Ways of sampling in which chance decides whether a sample is in a batch."""


def accounted_rate(loader: DataLoader[Any], sampling: str) -> float:
    """The rate with which a release is accounted.

    Args:
        loader: the loader.
        sampling: how batches are drawn; see :data:`dpfix.scan.options.SAMPLINGS`.

    Returns:
        :func:`sample_rate` for Poisson draws, else 1: a sample that is in a batch for certain gains nothing from chance.
    """
    return sample_rate(loader) if sampling in BY_CHANCE else 1.0


def accounted_compositions(batches: int, sampling: str, passes: float) -> int:
    """How many releases are accounted in so many passes of so many batches.

    Returns:
        With ``"shuffle"`` one for a pass, since a sample is in one of its batches; else one for a batch.
    """
    return math.ceil(passes if sampling == "shuffle" else passes * batches)


def sampling_of(loader: DataLoader[Any]) -> str:
    """How a loader in private training draws its batches."""
    return getattr(loader, "sampling", "fixed")


LARGER = 1e-30
"""Probability with which a Poisson draw may be larger than its largest batch: nothing beside the rounding of any accountant."""


def largest_batch(rate: float, population: int) -> int:
    """The size that a truncated draw is cut to, so large that the cut changes the distribution of a draw by ``LARGER`` at most.

    Whatever is proven for Poisson draws then holds at a delta that is larger by (1 + e^epsilon) steps ``LARGER``.

    Args:
        rate: probability of every sample.
        population: number of samples.

    Returns:
        The size, at most the number of samples.
    """
    low, high = 0, population
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if binom.sf(middle, population, rate) <= LARGER else (middle + 1, high)
    return low


def draws_with_replacement(loader: DataLoader[Any]) -> bool:
    """Whether the user's own sampler draws with replacement, which Poisson sampling does not."""
    sampler = getattr(loader.batch_sampler, "sampler", None)
    return isinstance(sampler, RandomSampler) and sampler.replacement


def of_sampling(loader: DataLoader[Any], sampling: str) -> list[Finding]:
    """Advice where the way of sampling changes how the script's loader draws, or costs much privacy.

    Args:
        loader: the script's loader.
        sampling: how batches are drawn.

    Returns:
        What is worth saying.
    """
    if sampling == "fixed":
        return [
            Finding.advice(
                "DPF031",
                "data_loader goes on drawing by itself; every step is accounted as if every sample were in it.",
                "only batches that are drawn by chance, or hold every sample once a pass, are known to reveal less.",
                help="sampling='poisson' (the default) gives the smallest epsilon; sampling='shuffle' keeps the loader's order "
                "and accounts a whole pass as one release.",
                path="data_loader",
            )
        ]
    if not draws_with_replacement(loader):
        return []
    return [
        Finding.advice(
            "DPF022",
            "data_loader draws with replacement; the private loader draws Poisson batches instead.",
            "the accountant assumes that every sample enters a batch independently, at most once.",
            path="data_loader",
        )
    ]


def part_sizes(samples: int, most: int) -> list[int]:
    """Sizes of the physical batches of a draw, as ``numpy.array_split`` makes them; an empty draw is one of nothing."""
    parts = max(1, -(-samples // most))
    return [samples // parts + (k < samples % parts) for k in range(parts)]


def how_it_reads(loader: DataLoader[Any]) -> dict[str, Any]:
    """The arguments of a loader that say how it reads: workers, memory, generator; not what it draws, and not how it collates."""
    names = (
        "num_workers", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context", "generator", "prefetch_factor",
        "persistent_workers",
    )  # fmt: skip
    return {name: getattr(loader, name) for name in names}

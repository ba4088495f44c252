"""Index set, batch size and sampling rate of a loader."""

from __future__ import annotations

from typing import Any

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


def draws_with_replacement(loader: DataLoader[Any]) -> bool:
    """Whether the user's own sampler draws with replacement, which Poisson sampling does not."""
    sampler = getattr(loader.batch_sampler, "sampler", None)
    return isinstance(sampler, RandomSampler) and sampler.replacement


def replaced_sampler(loader: DataLoader[Any]) -> list[Finding]:
    """Advice where Poisson sampling changes how the user's loader draws: it draws with replacement."""
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

"""The fingerprint of a loader's data, so that ranks can compare it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, DistributedSampler, Subset

from dpfix.instrument import pytree
from dpfix.instrument.rng import rng_untouched
from dpfix.sampling.people import People
from dpfix.sampling.ranks import digest
from dpfix.sampling.rate import index_set

READS = 6
"""How often a sample is read to tell what is always the same in it; by chance alone a transform is so once in thousands."""


def data_fingerprint(loader: DataLoader[Any]) -> dict[str, str | bytes]:
    """Index set and samples of a loader, so that ranks can compare them: they share out a batch by its indices.

    Returns:
        Digests by name: of the indices that are drawn from, also inside ``Subset`` and ``DistributedSampler``, and of what
        does not change from one reading to the next in two of the samples. For :meth:`dpfix.sampling.ranks.Ranks.check_same`.
    """
    indices = index_set(loader)
    found: dict[str, str | bytes] = {"the list of indices to draw from": digest(torch.as_tensor(indices))}
    dataset: Any = loader.dataset
    if isinstance(dataset, People):
        found["who the items belong to"] = digest(torch.as_tensor(dataset.indices)) + digest(
            torch.as_tensor(dataset.sizes)
        )
        dataset = dataset.dataset
    while isinstance(dataset, Subset):
        found[f"the list of indices of Subset {len(found)}"] = digest(torch.as_tensor(list(dataset.indices)))
        dataset = dataset.dataset
    sampler = getattr(loader.batch_sampler, "sampler", None)
    if isinstance(sampler, DistributedSampler):
        found["the DistributedSampler"] = f"seed {sampler.seed}, epoch {sampler.epoch}, shuffle {sampler.shuffle}"
    for position in (len(indices) // 3, len(indices) - 1):
        with rng_untouched():
            same = constants(loader.dataset, indices[position], READS)
        found |= {f"sample {position} of the data, entry {path}": value for path, value in same.items()}
    return found


def constants(dataset: Any, index: int, reads: int) -> dict[str, bytes]:
    """What is the same in a sample whenever it is read.

    Args:
        dataset: the data set.
        index: an index of it.
        reads: how often the sample is read.

    Returns:
        Digests of numbers and arrays by their path in the sample.
    """
    first, *others = (_digests(dataset[index]) for _ in range(reads))
    return {path: value for path, value in first.items() if all(o.get(path) == value for o in others)}


def _digests(item: Any) -> dict[str, bytes]:
    arrays = ((path, torch.as_tensor(leaf)) for path, leaf in pytree.leaves(item) if _is_array(leaf))
    return {str(path): digest(tensor) for path, tensor in arrays}


def _is_array(leaf: Any) -> bool:
    numbers = isinstance(leaf, (bool, int, float)) or (isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biuf")
    return numbers or (isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided)

"""A loader whose batches accelerate has shared out among processes, as one loader for all of them."""

from __future__ import annotations

from typing import Any

from torch.utils.data import BatchSampler, DataLoader

from dpfix.sampling.ranks import Ranks
from dpfix.sampling.rate import how_it_reads


def for_all_ranks(loader: DataLoader[Any], ranks: Ranks) -> DataLoader[Any]:
    """The loader that accelerate's ``prepare`` was given, with the batch size of all processes together.

    Its ``BatchSamplerShard`` hands whole batches, or parts of them (``split_batches``), to one process each. Here all processes
    draw one batch and each takes its part.

    Args:
        loader: any loader.
        ranks: the processes that train together.

    Returns:
        The loader itself, unless it shares out among just these processes what a plain ``BatchSampler`` makes.
    """
    shard: Any = loader.batch_sampler
    if type(shard).__name__ != "BatchSamplerShard" or shard.num_processes != ranks.size:
        return loader
    whole = shard.batch_sampler
    if type(whole) is not BatchSampler:
        return loader
    return DataLoader(
        loader.dataset,
        batch_size=whole.batch_size * (1 if shard.split_batches else shard.num_processes),
        sampler=whole.sampler,
        drop_last=whole.drop_last,
        collate_fn=loader.collate_fn,
        **how_it_reads(loader),
    )

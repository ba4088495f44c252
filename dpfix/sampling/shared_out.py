"""A loader whose batches accelerate has shared out among processes, as one loader for all of them."""

from __future__ import annotations

from typing import Any

from torch.utils.data import BatchSampler, DataLoader

from dpfix.sampling.ranks import Ranks
from dpfix.sampling.rate import how_it_reads


def for_all_ranks(loader: DataLoader[Any], ranks: Ranks) -> DataLoader[Any]:
    """The loader that accelerate's ``prepare`` was given, with the batch size of all processes together.

    Its ``BatchSamplerShard`` hands whole batches, or parts of them (``split_batches``), to one process each; so does its
    ``DataLoaderDispatcher``, which reads all of them in one process. Here all processes draw one batch and each takes its part.

    Args:
        loader: any loader.
        ranks: the processes that train together.

    Returns:
        The loader itself, unless it shares out among just these processes what a plain ``BatchSampler`` makes.
    """
    shard: Any = loader.batch_sampler
    if type(loader).__name__ == "DataLoaderDispatcher":
        whole, split = shard, loader.split_batches  # type: ignore[attr-defined]
    elif type(shard).__name__ == "BatchSamplerShard" and shard.num_processes == ranks.size:
        whole, split = shard.batch_sampler, shard.split_batches
    else:
        return loader
    if ranks.size == 1 or type(whole) is not BatchSampler:
        return loader
    return DataLoader(
        loader.dataset,
        batch_size=whole.batch_size * (1 if split else ranks.size),
        sampler=whole.sampler,
        drop_last=whole.drop_last,
        collate_fn=loader.collate_fn,
        **how_it_reads(loader),
    )

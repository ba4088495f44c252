from __future__ import annotations

from collections.abc import Iterator, Sized
from itertools import chain, islice
from typing import Any

import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    StackDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from typing_extensions import override

from dpfix.errors import LoaderError
from dpfix.report.finding import Finding, Fixability, Severity
from dpfix.rules.rule import Rule
from dpfix.sampling.people import people_of
from dpfix.sampling.poisson import unrecorded
from dpfix.sampling.ranks import Ranks
from dpfix.sampling.records import repeated
from dpfix.scan.scan import Scan

_POISSON_HELP = "use batch_size with a map-style dataset, or sampling='fixed', which accounts every step in full."
_Problem = tuple[str, str, str]
"""Fact, why and help."""


class LoaderFits(Rule):
    """The loader has to be one that Poisson sampling can stand in for.

    What: streams (``IterableDataset``), ready-made batches (``batch_size=None``), fewer samples than a batch with
    ``drop_last=True``, custom batch samplers, weighted samplers
    and samplers dpfix does not know. An index set that names one record several times: repeated indices in a ``Subset`` or
    a ``SubsetRandomSampler``, a data set that a ``ConcatDataset`` contains twice.

    Why bad: the accountant assumes that every sample of a fixed set enters a batch independently with one probability.
    Opacus discards the sampler of such a loader silently: all held-out samples of a ``SubsetRandomSampler`` were drawn,
    length buckets and weights are lost. A record under four indices can be in one batch four times, and moves the released
    sum by four clip norms, also without Poisson sampling.

    Example: ``DataLoader(dataset, batch_sampler=LengthBuckets(...))``.

    Use instead: a map-style dataset with ``batch_size`` and no sampler, ``RandomSampler`` or ``SubsetRandomSampler`` (its
    index set is kept, and the rate is batch size over its length). A ``DistributedSampler`` over all ranks is one too: its
    batch size is that of one rank. Every index once, with weights in the loss in place of copies, and
    ``AugmentationMultiplicity`` in place of copies with other transforms.
    """

    title = "the data loader cannot be sampled as the accountant assumes"
    error = LoaderError
    severity = Severity.BREAKS_GUARANTEE
    outcomes = {
        Fixability.REFUSED: "everything but the known samplers, which are replaced by a Poisson sampler over the same "
        "index set; an index set that names a record several times."
    }

    @override
    def find(self, scan: Scan) -> Iterator[Finding]:
        for fact, why, help in _problems(scan):
            yield self.refusal(fact, why, help, "data_loader")

    VALID = (
        lambda: _pair(batch_size=8),
        lambda: _pair(batch_size=8, shuffle=True, drop_last=True),
        lambda: _pair(batch_size=4, sampler=SubsetRandomSampler(range(12))),
        lambda: _pair(batch_size=4, dataset=ConcatDataset([Subset(_data(), range(12)), _data()])),
    )
    INVALID = (
        lambda: _pair(batch_size=None),
        lambda: _pair(batch_size=8, dataset=_Stream()),
        lambda: _pair(batch_size=25, drop_last=True),
        lambda: _pair(batch_sampler=[[0, 1], [2, 3, 4]]),
        lambda: _pair(batch_size=8, sampler=WeightedRandomSampler([1.0] * 24, 24)),
        lambda: _pair(batch_size=8, sampler=DistributedSampler(TensorDataset(torch.zeros(24)), num_replicas=2, rank=0)),
        lambda: _pair(batch_size=4, dataset=Subset(_data(), [0, 0, 0, *range(12)])),
        lambda: _pair(batch_size=4, sampler=SubsetRandomSampler([0, 0, 0, *range(12)])),
        lambda: _pair(batch_size=4, dataset=ConcatDataset([_data()] * 2)),
    )


def _problems(scan: Scan) -> Iterator[_Problem]:
    """At most one."""
    loader = scan.data_loader
    if isinstance(loader.dataset, IterableDataset):
        yield (
            f"data_loader reads {type(loader.dataset).__name__}, an IterableDataset.",
            "a stream has no set of samples to draw from with a known probability.",
            "index it: a torch.utils.data.Dataset with __len__ and __getitem__, over list(stream) where that fits into memory. "
            "A Hugging Face stream: load_dataset(..., streaming=False). Tar shards (WebDataset): one index over shards and "
            "members, read in __getitem__ (wids.ShardListDataset), or the files unpacked.",
        )
    elif loader.batch_sampler is None:
        yield (
            "data_loader has batch_size=None: the dataset delivers ready-made batches.",
            "the privacy unit is one sample; a batch made beforehand cannot be sampled sample by sample.",
            "let the dataset deliver single samples and set batch_size in the DataLoader.",
        )
    elif not isinstance(loader.dataset, Sized) or len(loader.dataset) == 0:
        yield (
            f"data_loader reads {type(loader.dataset).__name__}, which has no length or is empty.",
            "the sampling rate is batch size over the number of samples.",
            "give the dataset a __len__ that counts its samples.",
        )
    elif (nothing := _nothing_to_deliver(loader)) is not None:
        yield nothing
    else:
        ranks = scan.ranks or Ranks.of(scan.module)
        problems = _order_on_ranks(loader, ranks)
        if scan.privacy.poisson_sampling:
            problems = _sampler(loader, ranks, ordered=scan.privacy.sampling == "shuffle")
        yield from islice(chain(problems, _one_record_several_times(loader), _items_in_place_of_persons(scan)), 1)


def _nothing_to_deliver(loader: DataLoader[Any]) -> _Problem | None:
    batches = loader.batch_sampler
    if type(batches) is not BatchSampler or len(batches):
        return None
    samples = len(batches.sampler)  # type: ignore[arg-type]
    if not samples:
        return (
            f"data_loader has a {type(batches.sampler).__name__} without an index.",
            "there is no sample to draw.",
            "give it the indices that are to be drawn.",
        )
    return (
        f"data_loader has drop_last=True and {samples} sample(s) for batches of {batches.batch_size}: it delivers nothing.",
        "without a batch there is no step, and no sampling rate.",
        f"pass batch_size={samples} or less, or drop_last=False.",
    )


def _sampler(loader: DataLoader[Any], ranks: Ranks, *, ordered: bool) -> Iterator[_Problem]:
    batches = unrecorded(loader.batch_sampler)
    if ordered and (hasattr(batches, "sample_rate") or _repeats(batches)):
        yield (
            f"data_loader may deliver a sample several times in a pass ({type(getattr(batches, 'sampler', batches)).__name__}), "
            "with sampling='shuffle'.",
            "a pass is accounted as one release, which is right only if every sample is in one of its batches.",
            "use shuffle=True without replacement, or sampling='poisson'.",
        )
        return
    if hasattr(batches, "sample_rate"):  # already a Poisson sampler of Opacus or dpfix
        return
    if type(batches) is not BatchSampler:
        yield (
            f"data_loader has a batch_sampler of its own, {type(batches).__name__}.",
            "Poisson sampling would discard it, and without it the batches are not what the accountant assumes.",
            _POISSON_HELP,
        )
        return
    sampler = batches.sampler
    if isinstance(sampler, WeightedRandomSampler):
        yield (
            "data_loader draws with weights (WeightedRandomSampler).",
            "samples drawn more often lose more privacy than the accountant's single rate says.",
            "weight the loss per sample instead. " + _POISSON_HELP,
        )
    elif isinstance(sampler, DistributedSampler):
        if sampler.num_replicas != ranks.size or sampler.dataset is not loader.dataset:
            yield (
                f"data_loader has a DistributedSampler for {sampler.num_replicas} rank(s), and {ranks.size} rank(s) train this "
                "model, on the loader's dataset.",
                "every sample has to be drawn with one probability, by the ranks together.",
                "wrap the model with opacus.distributed.DifferentiallyPrivateDistributedDataParallel on every rank of the "
                "sampler, or leave the sampler out. " + _POISSON_HELP,
            )
    elif not isinstance(sampler, (RandomSampler, SequentialSampler, SubsetRandomSampler)):
        yield (
            f"data_loader has a sampler of its own, {type(sampler).__name__}.",
            "dpfix cannot tell which samples it draws from, nor how often.",
            "use shuffle=True, or a SubsetRandomSampler over the indices. " + _POISSON_HELP,
        )


def _repeats(batches: Any) -> bool:
    sampler = getattr(batches, "sampler", None)
    return isinstance(sampler, RandomSampler) and (sampler.replacement or len(sampler) > len(sampler.data_source))


def _order_on_ranks(loader: DataLoader[Any], ranks: Ranks) -> Iterator[_Problem]:
    """Without Poisson sampling the loader's own order must never give a sample to two ranks in one step."""
    sampler = getattr(loader.batch_sampler, "sampler", None)
    if ranks.size == 1 or (
        isinstance(sampler, DistributedSampler)
        and (sampler.rank, sampler.num_replicas) == (ranks.rank, ranks.size)
        and (sampler.drop_last or len(loader.dataset) % ranks.size == 0)  # type: ignore[arg-type]
    ):
        return
    yield (
        f"data_loader has poisson_sampling=False and no DistributedSampler that shares its samples among {ranks.size} ranks "
        "without repeating any.",
        "a sample that two ranks have in one step is released with twice the clip norm.",
        f"pass DistributedSampler(dataset, num_replicas={ranks.size}, rank={ranks.rank}, drop_last=True), or leave "
        "poisson_sampling at True.",
    )


def _one_record_several_times(loader: DataLoader[Any]) -> Iterator[_Problem]:
    """Also without Poisson sampling: the clip norm bounds a record's share of a release only if a batch holds it once."""
    found = repeated(loader)
    if found is None:
        return
    shown = ", ".join(map(str, found.indices[:4])) + (", ..." if found.times > 4 else "")
    yield (
        f"data_loader names {found.records} record(s) several times ({_where(loader)}): one {found.times} times, by its indices "
        f"{shown}.",
        f"a batch can hold the copies together: that record then moves the released sum by {found.times} clip norms, and the "
        "accountant counts one.",
        "keep every index once (dict.fromkeys(indices)) and weight the loss per sample instead; for copies with other "
        "transforms pass augmentation=dpfix.AugmentationMultiplicity(transform). With privacy_unit= all that a person has "
        "counts as one, copies too.",
    )


def _items_in_place_of_persons(scan: Scan) -> Iterator[_Problem]:
    if scan.privacy.privacy_unit is not None and people_of(scan.data_loader) is None:
        yield (
            "data_loader draws items, and privacy_unit= asks for persons.",
            "who has several items would be clipped once for each of them.",
            "use a DataLoader with batch_size over a data set with a length, and no sampler of its own.",
        )


def _where(loader: DataLoader[Any]) -> str:
    wrapped = isinstance(loader.dataset, (Subset, ConcatDataset, StackDataset))
    own = getattr(getattr(loader.batch_sampler, "sampler", None), "indices", None)
    names = [type(loader.dataset).__name__] if wrapped else []
    names += [f"the indices of {type(loader.batch_sampler.sampler).__name__}"] if own is not None else []  # type: ignore[union-attr]
    return " and ".join(names) or "its indices"


class _Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter([(torch.zeros(6), 0)] * 24)

    def __len__(self) -> int:
        return 24


def _pair(**options: Any) -> dict[str, Any]:
    data = options.pop("dataset", None) or _data()
    return {"module": nn.Sequential(nn.Linear(6, 3)), "data_loader": DataLoader(data, **options)}


def _data() -> TensorDataset:
    return TensorDataset(torch.randn(24, 6), torch.randint(0, 3, (24,)))

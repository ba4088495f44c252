"""From ``privacy_unit`` and ``items_per_unit`` to a loader that draws persons."""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import replace
from functools import partial
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset

from dpfix.errors import ArgumentError, LoaderError
from dpfix.sampling.people import KNOWN_SAMPLERS, People, loader_of_people, people_of
from dpfix.sampling.unit_names import names_of
from dpfix.scan.request import Request
from dpfix.scan.values import plain, shown


def by_person(request: Request) -> Request:
    """The request with a loader that draws persons, if that was asked for now or in the call from which the loader comes.

    Returns:
        The request; its ``privacy_unit`` is the data set of persons then. A loader that cannot draw persons is left for the
        rule about loaders to refuse.

    Raises:
        ArgumentError: the arguments cannot be used.
        LoaderError: the loader has been made private already, with other units.
    """
    privacy, loader = request.privacy, request.data_loader
    unit, most = privacy.privacy_unit, _most(privacy.items_per_unit)
    known = people_of(loader)
    if unit is None and most is not None:
        raise ArgumentError(
            f"items_per_unit={most} without privacy_unit.",
            "It is the number of items of a person that enter a batch together.",
            "Pass privacy_unit= too: a key, a function of an item, or a list of names.",
            path="items_per_unit",
        )
    if unit is None:
        return request if known is None else _with(request, loader, known)
    if not privacy.poisson_sampling:
        raise ArgumentError(
            "privacy_unit with sampling='fixed' (poisson_sampling=False):",
            "that leaves the script's loader alone, which draws items and not persons.",
            "Use sampling='poisson', or sampling='shuffle' for every person once a pass.",
            path="privacy_unit",
        )
    if known is not None:
        return _again(request, known, unit, most)
    if not _draws_items(loader):
        return request
    if hasattr(loader.batch_sampler, "sample_rate"):
        raise LoaderError(
            f"data_loader draws Poisson batches already ({type(loader.batch_sampler).__name__}), of items:",
            "they cannot be made batches of persons.",
            "Pass the script's own loader.",
            path="data_loader",
        )
    if isinstance(unit, People) and unit.dataset is loader.dataset and unit.most == most:
        names = unit.given
    else:
        names = partial(names_of, given=unit)
    made = loader_of_people(loader, names, most)
    return _with(request, made, made.dataset)


def _with(request: Request, loader: DataLoader[Any], people: People) -> Request:
    privacy = replace(request.privacy, privacy_unit=people, items_per_unit=people.most)
    return replace(request, data_loader=loader, privacy=privacy)


def _most(given: Any) -> int | None:
    value = plain(given)
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise ArgumentError(
        f"items_per_unit={shown(given)} is not a whole number of at least 1, nor None.",
        "It is the number of items of a person that enter a batch together.",
        "Leave it out for all of them.",
        path="items_per_unit",
    )


def _again(request: Request, known: People, unit: Any, most: int | None) -> Request:
    """A loader of an earlier call goes on with the units that it has."""
    if unit is not known:
        indices = sorted(known.indices)
        other = People(known.dataset, indices, names_of(known.dataset, indices, unit), most)
        if not other.same_persons(known) or most != known.most:
            raise LoaderError(
                f"data_loader comes from an earlier call and draws {len(known)} persons, {known.describe()}; privacy_unit and "
                f"items_per_unit name {len(other)} persons, {other.describe()}.",
                "A loader draws the units that it was made for.",
                "Pass the script's own loader, or leave both out to go on as before.",
                path="data_loader",
            )
    return _with(request, request.data_loader, known)


def _draws_items(loader: DataLoader[Any]) -> bool:
    """Whether the rule about loaders may accept it: else it is refused there, in words about what it is."""
    batches, dataset = loader.batch_sampler, loader.dataset
    if isinstance(dataset, IterableDataset) or not isinstance(dataset, Sized) or not len(dataset):
        return False
    if hasattr(batches, "sample_rate"):
        return True
    sampler = getattr(batches, "sampler", None)
    own = not isinstance(sampler, DistributedSampler) or sampler.dataset is dataset
    return type(batches) is BatchSampler and isinstance(sampler, KNOWN_SAMPLERS) and own

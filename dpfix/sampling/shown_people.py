"""Whether a data set shows that its items belong to persons: cheap looks at names of columns and of files."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch.utils.data import ConcatDataset, DataLoader, Subset

from dpfix.layout.row_count import is_rows
from dpfix.report.finding import Finding
from dpfix.sampling.people import people_of
from dpfix.sampling.rate import index_set
from dpfix.sampling.records import looks_up_as
from dpfix.sampling.unit_names import NoNameError, column, name, raw_entries

_PERSON = re.compile(r"(patient|subject|case|user|person|participant|speaker|donor)s?(id|name|uid|key|number|no|nr)?")
_BIDS = re.compile(r"(?:^|[/\\_])(sub-[A-Za-z0-9]+)(?=[/\\_.]|$)")
_LISTS = ("samples", "imgs", "files", "filenames", "file_names", "paths", "image_paths", "image_files")
"""Attributes in which data sets keep the names of their files: of torchvision, and customary ones."""


def people_shown(loader: DataLoader[Any], items: Sequence[Any]) -> list[Finding]:
    """Advice where privacy is accounted for items and the data set shows persons who have several of them.

    Args:
        loader: the loader of the call.
        items: some samples that were read anyway.

    Returns:
        At most one finding.
    """
    if people_of(loader) is not None:
        return []
    found = _by_key(loader, items) or _by_file(loader, items)
    return [] if found is None else [found]


def _by_key(loader: DataLoader[Any], items: Sequence[Any]) -> Finding | None:
    of_items = items[0][0] if is_rows(items[0]) else items[0]
    keys = [*_columns(loader.dataset), *(of_items if isinstance(of_items, Mapping) else ())]
    for key in (key for key in dict.fromkeys(keys) if isinstance(key, str) and _names_persons(key)):
        values = column(loader.dataset, key)
        if values is None:
            if not _is_name(of_items.get(key)):
                continue
            return _advice(
                f"the items of {type(loader.dataset).__name__} have a key {key!r}, which may name the same person several times.",
                f"privacy_unit={key!r}",
            )
        found = _several(values[index] for index in index_set(loader))
        if found is not None:
            return _advice(
                f"{type(loader.dataset).__name__} has a column {key!r} that names {found[0]} persons for {found[1]} items, one "
                f"of them {found[2]} times.",
                f"privacy_unit={key!r}",
            )
    return None


def _names_persons(key: str) -> bool:
    return _PERSON.fullmatch(re.sub(r"[^a-z]", "", key.lower())) is not None


def _is_name(value: Any) -> bool:
    try:
        return isinstance(name(value), (str, int))
    except NoNameError:
        return False


def _several(values: Iterable[Any]) -> tuple[int, int, int] | None:
    """Persons, items and the most items of one; ``None`` if nobody has several, or if these are no names."""
    try:
        counts: Counter[Hashable] = Counter(name(value) for value in values)
    except NoNameError:
        return None
    most = max(counts.values(), default=0)
    return (len(counts), counts.total(), most) if most > 1 else None


def _columns(dataset: Any) -> list[Any]:
    """Names of what every item has, where the data set keeps them."""
    if looks_up_as(dataset, Subset):
        return _columns(dataset.dataset)
    if looks_up_as(dataset, ConcatDataset):
        return _columns(dataset.datasets[0])
    names, raw = getattr(dataset, "column_names", None), raw_entries(dataset)
    if isinstance(names, (list, tuple)):
        return list(names)
    return list(raw[0]) if raw else []


# ------------------------------------------------------------------ names of files


def _by_file(loader: DataLoader[Any], items: Sequence[Any]) -> Finding | None:
    files = _files(loader.dataset)
    if files is None:
        of_items = [row for item in items for row in (item if is_rows(item) else [item]) if isinstance(row, Mapping)]
        subject = next((one for row in of_items for one in _subjects(row.values())), None)
        fact = f"an item of {type(loader.dataset).__name__} names a file of {subject!r}, who may have several."
    else:
        subjects = [next(_subjects([files[index]]), None) for index in index_set(loader)]
        found = _several(one for one in subjects if one is not None)
        subject = None if found is None else next(one for one in subjects if one is not None)
        fact = "" if found is None else _of_files(type(loader.dataset).__name__, subject, found)
    return (
        None
        if subject is None
        else _advice(fact, "privacy_unit= the list of the items' subjects, the part sub-... of the names")
    )


def _of_files(name: str, first: Any, found: tuple[int, int, int]) -> str:
    persons, items, most = found
    return f"the files of {name} are those of {persons} persons ({first}, ...) for {items} items, {most} of one."


def _subjects(values: Iterable[Any]) -> Iterator[str]:
    for value in values:
        parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else [value]
        for part in parts:
            match = _BIDS.search(os.fspath(part)) if isinstance(part, (str, os.PathLike)) else None
            if match is not None:
                yield match[1]
                return


def _files(dataset: Any) -> Sequence[Any] | None:
    """What names the file of every item."""
    if looks_up_as(dataset, Subset):
        inner = _files(dataset.dataset)
        return None if inner is None else [inner[int(i)] for i in dataset.indices]
    if looks_up_as(dataset, ConcatDataset):
        parts = [_files(part) for part in dataset.datasets]
        return None if any(part is None for part in parts) else [one for part in parts for one in part or ()]
    raw = raw_entries(dataset)
    if raw is not None:
        return raw
    for attribute in _LISTS:
        found = getattr(dataset, "__dict__", {}).get(attribute)
        if isinstance(found, (list, tuple)) and len(found) == len(dataset):
            return found
    return None


def _advice(fact: str, unit: str) -> Finding:
    return Finding.advice(
        "DPF050",
        fact,
        "what is accounted is one item: epsilon of who has several of them is more than so many times as large.",
        help=f"pass {unit}, and persons are drawn, clipped and accounted.",
        path="data_loader",
    )

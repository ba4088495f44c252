"""Whose an item of a data set is: names given one by one, by a function, or under a key."""

from __future__ import annotations

import enum
import inspect
import unicodedata
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Subset

from dpfix.errors import USER_CODE_ERRORS, ArgumentError
from dpfix.instrument.rng import rng_untouched
from dpfix.layout.row_count import is_rows
from dpfix.sampling.records import looks_up_as

BY_INDEX = ("index", "idx", "i")
"""A function whose parameter has one of these names is called with the index, any other with the item."""
READ_AGAIN = 4
"""Items that are read twice, to see whether they keep their name."""


@dataclass(frozen=True)
class Names:
    """Who some items belong to.

    Attributes:
        of_items: a name for every index, in their order.
        words: how the names were given.
        told_by: tells it from an item; ``None`` where an item does not tell it.
    """

    of_items: list[Hashable]
    words: str
    told_by: Callable[[Any], Hashable] | None = None


class NoNameError(ValueError):
    """What stands for a name is none; caught where the place of the item is known."""


def names_of(dataset: Any, indices: Sequence[int], given: Any) -> Names:
    """Who the items of a data set belong to.

    Args:
        dataset: the data set.
        indices: the indices that are drawn from.
        given: a function of the item (or of the index, see :data:`BY_INDEX`), the key of a mapping or the name of a column, or
            a sequence with a name for every index of the data set.

    Returns:
        A name for each of the indices.

    Raises:
        ArgumentError: it is something else, names are missing, or cannot be told apart.
    """
    if isinstance(given, str):
        return _by_key(dataset, indices, given)
    if callable(given) and not isinstance(given, type):
        return _by_function(dataset, indices, given)
    return Names(_names(zip(indices, _listed(dataset, indices, given), strict=True)), "a name for every item")


def name(value: Any) -> Hashable:
    """A name as a plain value.

    Returns:
        Numbers in tensors and arrays as numbers.

    Raises:
        NoNameError: it is missing, or equal ones could not be recognised.
    """
    if type(value) is int:
        return value
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        if np.size(value) != 1:
            raise NoNameError(f"a {type(value).__name__} of shape {tuple(value.shape)}, which is not one value")
        value = value.item()
    if value is None or (isinstance(value, str) and not value.strip()):
        raise NoNameError(repr(value))
    if isinstance(value, tuple):
        return tuple(name(part) for part in value)
    try:
        hash(value)
        missing = bool(value != value)
    except TypeError:  # pandas.NA is neither equal nor not
        raise NoNameError(f"a {type(value).__name__}, which has no hash") from None
    if missing:
        raise NoNameError(repr(value))
    if type(value).__eq__ is object.__eq__ and not isinstance(value, enum.Enum):
        raise NoNameError(f"a {type(value).__name__}, of which no two are equal")
    return value


# ------------------------------------------------------------------ a list, a function, a key


def _listed(dataset: Any, indices: Sequence[int], given: Any) -> Iterator[Any]:
    values = given.tolist() if hasattr(given, "tolist") else given
    if isinstance(values, (Mapping, bytes)) or not (hasattr(values, "__len__") and hasattr(values, "__getitem__")):
        raise ArgumentError(
            f"privacy_unit is {type(given).__name__}.",
            "It says to whom every item belongs.",
            "Pass a key of the items ('patient_id'), a function of an item, or a list with a name for every index.",
            path="privacy_unit",
        )
    if len(values) != len(dataset):
        inner = getattr(dataset, "dataset", None)
        whole = isinstance(dataset, Subset) and hasattr(inner, "__len__") and len(inner) == len(values)  # type: ignore[arg-type]
        raise ArgumentError(
            f"privacy_unit has {len(values)} names, and {type(dataset).__name__} has {len(dataset)} items.",
            "Entry i is the name of the person that dataset[i] belongs to.",
            "Pass [names[i] for i in subset.indices]." if whole else "Pass one name for every item.",
            path="privacy_unit",
        )
    return (values[index] for index in indices)


def _by_function(dataset: Any, indices: Sequence[int], function: Callable[[Any], Any]) -> Names:
    words = f"the function {getattr(function, '__qualname__', type(function).__name__)}"
    if _first_parameter(function) in BY_INDEX:
        return Names(_names((i, _called(function, i, i)) for i in indices), f"{words} of the index")
    names = _told(dataset, indices, lambda item, index: _called(function, item, index))
    return Names(names, words, lambda item: name(function(item)))


def _first_parameter(function: Callable[[Any], Any]) -> str:
    try:
        return next(iter(inspect.signature(function).parameters), "")
    except (TypeError, ValueError):
        return ""


def _called(function: Callable[[Any], Any], argument: Any, index: int) -> Any:
    try:
        return function(argument)
    except USER_CODE_ERRORS as error:
        by_index = argument is index
        raise ArgumentError(
            f"privacy_unit failed for index {index}: {type(error).__name__}: {error}.",
            f"It was called with {'the index' if by_index else f'the item, a {type(argument).__name__}'}: a function whose "
            f"parameter is called {', '.join(BY_INDEX)} gets the index, any other the item.",
            "Rename its parameter, or pass a list with a name for every index of the data set.",
            path="privacy_unit",
        ) from error


def _by_key(dataset: Any, indices: Sequence[int], key: str) -> Names:
    words, cheap = f"privacy_unit={key!r}", column(dataset, key)
    if cheap is not None:
        names = _names((i, cheap[i]) for i in indices)
    else:
        names = _told(dataset, indices, lambda item, index: _entry(item, key, index))
    return Names(names, words, lambda item: _name_in(item, key))


def _told(dataset: Any, indices: Sequence[int], tell: Callable[[Any, int], Any]) -> list[Hashable]:
    """Read every item, and a few of them twice."""
    again = [indices[k * len(indices) // READ_AGAIN] for k in range(min(READ_AGAIN, len(indices)))]
    with rng_untouched():
        names = _names((i, tell(_item(dataset, i), i)) for i in indices)
        second = _names((i, tell(_item(dataset, i), i)) for i in again)
    known = dict(zip(indices, names, strict=True))
    for index, now in zip(again, second, strict=True):
        check_unchanged(index, known[index], now)
    return names


def check_unchanged(index: int, before: Hashable, now: Hashable) -> None:
    """An item belongs to whom it belonged before.

    Raises:
        ArgumentError: it belongs to somebody else.
    """
    if now == before:
        return
    raise ArgumentError(
        f"privacy_unit: the item of index {index} belonged to {before!r}, and belongs to {now!r} now.",
        "Whose an item is has to stay the same as long as the training lasts: a person with two names is clipped as two.",
        "Name persons by what does not change; a data set that exchanges its items needs a list of all of them.",
        path="privacy_unit",
    )


def _item(dataset: Any, index: int) -> Any:
    try:
        return dataset[index]
    except USER_CODE_ERRORS as error:
        raise ArgumentError(
            f"privacy_unit: reading item {index} of {type(dataset).__name__} failed: {type(error).__name__}: {error}.",
            help="Make sure that dataset[i] works for every index, or pass a list of names.",
            path="privacy_unit",
        ) from error


def _entry(item: Any, key: str, index: int) -> Any:
    rows = item if is_rows(item) else [item]
    found = [row[key] for row in rows if isinstance(row, Mapping) and key in row]
    if len(found) < len(rows):
        has = f"with the keys {', '.join(map(str, rows[0]))}" if isinstance(rows[0], Mapping) else "and no mapping"
        raise ArgumentError(
            f"privacy_unit={key!r}: item {index} is {type(item).__name__} {has}.",
            "Nobody is named there, and the data set has no column of that name.",
            "Pass the key that names the person, a function of an item, or a list with a name for every index of the data set.",
            path="privacy_unit",
        )
    if any(type(one) is not type(found[0]) or one != found[0] for one in found[1:]):
        raise ArgumentError(
            f"privacy_unit={key!r}: item {index} has rows of several persons.", help="Split it.", path="privacy_unit"
        )
    return found[0]


def _name_in(item: Any, key: str) -> Hashable:
    """The name in an item as it is delivered; ``None`` where a transform has taken it out."""
    row = item[0] if is_rows(item) else item
    return name(row[key]) if isinstance(row, Mapping) and key in row else None


def column(dataset: Any, key: str) -> Sequence[Any] | None:
    """What stands under a key in all items, where a data set tells that without making its items.

    That are the columns of Hugging Face's data sets and the raw entries of MONAI's, through torch's wrappers.

    Returns:
        A value for every index; ``None`` where it cannot be told so.
    """
    if looks_up_as(dataset, Subset):
        inner = column(dataset.dataset, key)
        return None if inner is None else [inner[int(i)] for i in dataset.indices]
    if looks_up_as(dataset, ConcatDataset):
        parts = [column(part, key) for part in dataset.datasets]
        return None if any(part is None for part in parts) else [value for part in parts for value in part or ()]
    names = getattr(dataset, "column_names", None)
    if isinstance(names, (list, tuple)) and key in names:
        unformatted = dataset.with_format(None) if hasattr(dataset, "with_format") else dataset
        return list(unformatted[key])
    raw = raw_entries(dataset)
    return None if raw is None or not all(key in entry for entry in raw) else [entry[key] for entry in raw]


def raw_entries(dataset: Any) -> Sequence[Mapping[Any, Any]] | None:
    """The entries from which a data set of MONAI makes its items, where entry ``i`` is that of item ``i``."""
    if getattr(
        type(dataset).__dict__.get("__getitem__", getattr(type(dataset), "__getitem__", None)), "__module__", ""
    ) != ("monai.data.dataset"):
        return None
    raw = getattr(dataset, "data", None)
    fits = isinstance(raw, Sequence) and len(raw) == len(dataset) and all(isinstance(entry, Mapping) for entry in raw)
    return raw if fits else None


# ------------------------------------------------------------------ names have to tell persons apart


def _names(values: Iterable[tuple[int, Any]]) -> list[Hashable]:
    found: list[Hashable] = []
    missing: list[tuple[int, str]] = []
    items = 0
    for index, value in values:
        items += 1
        try:
            found.append(name(value))
        except NoNameError as error:
            missing.append((index, str(error)))
    if missing:
        index, what = missing[0]
        raise ArgumentError(
            f"privacy_unit: {len(missing)} of {items} items have no name that tells whose they are; the first is the item of "
            f"index {index}: {what}.",
            "Every item has to belong to one person, and equal names mean one person.",
            "Name the persons by strings or numbers, and leave out items that belong to nobody known (torch.utils.data.Subset).",
            path="privacy_unit",
        )
    _check_spelling(found)
    return found


def _check_spelling(names: Iterable[Hashable]) -> None:
    """Two names that read alike are one person with two spellings."""
    spelt: dict[str, Hashable] = {}
    for one in dict.fromkeys(names):
        other = spelt.setdefault(unicodedata.normalize("NFC", str(one)).strip(), one)
        if other != one:
            raise ArgumentError(
                f"privacy_unit names persons {other!r} and {one!r}.",
                "They read alike; a person with two spellings would be drawn and clipped as two.",
                "Give all names one type, without spaces around them.",
                path="privacy_unit",
            )

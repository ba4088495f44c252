"""Python numbers that the script reads from a batch and computes with: they are followed by their values."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dpfix.instrument import pytree
from dpfix.training.follow.calls import ARITHMETIC, NOWHERE, Call, ModelCall, Place
from dpfix.training.follow.delivery import Exchange
from dpfix.training.follow.judge import difference
from dpfix.training.follow.step import NotFollowedError, RealStep

if TYPE_CHECKING:
    from dpfix.training.follow.replay import Replay


@dataclass(frozen=True)
class Told:
    """A Python value that was made of a tensor's values, or that summarises Python numbers of a delivered batch.

    Attributes:
        place: where it was read; ``None`` for numbers of the batch itself.
        value: the value with other samples.
        before: the value with the samples of the step.
    """

    place: Place | None
    value: Any
    before: Any

    @property
    def numbers(self) -> Iterator[tuple[float, float]]:
        """Pairs of numbers in it that differ, before and with the other samples."""
        if _is_number(self.before) and _is_number(self.value):
            if self.before != self.value:
                yield float(self.before), float(self.value)
        elif isinstance(self.before, (list, tuple)) and isinstance(self.value, (list, tuple)):
            pairs = [*zip(numbers_in(self.before), numbers_in(self.value), strict=False)]
            pairs += [(a, b) for a, b in zip(self.before, self.value, strict=False) if _is_number(a) and _is_number(b)]
            yield from ((float(a), float(b)) for a, b in pairs if a != b)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


def numbers_in(entries: Any) -> list[float]:
    """Counts of Python numbers: their sum, mean, extremes, how many are not zero, how many differ; of texts, lengths.

    Args:
        entries: a list with numbers, or with one mapping or tuple per sample.

    Returns:
        The counts, always equally many for equal structures.
    """
    columns: dict[Any, list[float]] = defaultdict(list)
    texts: dict[Any, list[float]] = defaultdict(list)
    for entry in entries:
        for path, leaf in pytree.leaves(entry):
            if _is_number(leaf) or isinstance(leaf, bool):
                columns[path].append(float(leaf))
            elif isinstance(leaf, str):
                texts[path].append(float(len(leaf)))
    out: list[float] = []
    for _, column in sorted(columns.items(), key=lambda item: repr(item[0])):
        total = math.fsum(column)
        used = sum(1 for x in column if x)
        out += [total, total / len(column), max(column), min(column), float(used), float(len(set(column)))]
    for _, column in sorted(texts.items(), key=lambda item: repr(item[0])):
        out += [math.fsum(column), max(column)]
    return out


@dataclass(frozen=True)
class Followed:
    """A number in an arithmetic function that follows from the batch, as far as its value tells.

    Attributes:
        place: where the script computes with it.
        value: the number.
        told: the number of the batch that it equals, or is the inverse of.
        changes: what it becomes with other samples, by the number of the call and of the argument.
        written: whether the script's code has the number itself, so that it can equal one of the batch by chance only.
    """

    place: Place
    value: float
    told: float
    changes: dict[tuple[int, int | str], Any]
    written: bool


def that_follow(calls: Sequence[Call | ModelCall], told: Sequence[Told]) -> list[Followed]:
    """Numbers in arithmetic functions that equal a number of the batch, or its inverse.

    Args:
        calls: the calls that the loss is made of.
        told: what the script has read, or may have read.

    Returns:
        One entry per number.
    """
    pairs = {pair for one in told for pair in one.numbers if all(map(math.isfinite, pair))}
    found = []
    for number, call in enumerate(calls):
        if isinstance(call, Call):
            for k, value in numbers_of(call):
                told_number, new = _followed(value, pairs)
                if told_number is not None:
                    consts = call.place[0].co_consts
                    written = (tuple(value) if isinstance(value, (list, tuple)) else value) in consts
                    one = told_number if isinstance(value, (list, tuple)) else value
                    found.append(Followed(call.place, one, told_number, {(number, k): new}, written))
    return found


def numbers_of(call: Call) -> Iterator[tuple[int | str, Any]]:
    """Python numbers with which a function computes: those of arithmetic ones, and named options of all.

    Args:
        call: a call of it.

    Yields:
        Position or name, and the number or a list of numbers.
    """
    given: list[tuple[int | str, Any]] = [*enumerate(call.args)] if call.name in ARITHMETIC else []
    given += [(k, v) for k, v in call.kwargs.items() if k in _OPTIONS or call.name in ARITHMETIC]
    for k, value in given:
        if _is_number(value) or (type(value) in (list, tuple) and value and all(map(_is_number, value))):
            yield k, value


def numbers_given(call: ModelCall) -> Iterator[tuple[Any, Any]]:
    """Python numbers with which the model is called, by their path."""
    return ((path, leaf) for path, leaf in pytree.leaves((call.args, call.kwargs)) if _is_number(leaf))


_OPTIONS = frozenset({"alpha", "beta", "value", "other", "label_smoothing", "fill_value", "weight", "min", "max"})


def _followed(value: Any, pairs: set[tuple[float, float]]) -> tuple[float | None, Any]:
    """The number of the batch that a number or one of a list equals, and what they become."""
    if isinstance(value, (list, tuple)):
        told, new = None, list(value)
        for k, one in enumerate(value):
            number, other = _followed(one, pairs)
            if number is not None:
                told, new[k] = number, other
        return told, new
    if value not in _COMMON:
        for before, after in pairs:
            new = _other(float(value), before, after)
            if new is not None:
                return before, new
    return None, value


_COMMON = frozenset({0, 1, -1})


def _other(value: float, before: float, after: float) -> float | None:
    """What a number becomes, if it is one of the batch or the inverse of one."""
    if math.isclose(value, before, rel_tol=1e-6):
        return after
    if before and math.isclose(value * before, 1, rel_tol=1e-6):
        return 1 / after if after else 0.0
    return None


def looks_small(value: float) -> bool:
    """Whether a number is so small that settings of a script, and counts that it has not read, have it by chance."""
    return value == round(value) and abs(value) <= _FEW


def looks_like_a_setting(value: float) -> bool:
    """Whether a number is one that scripts have as a constant: small, round, or with one digit."""
    if value != round(value):
        return value == float(f"{value:.1g}")
    return looks_small(value) or value % 10 == 0 or int(abs(value)).bit_count() == 1


_FEW = 10


@dataclass(frozen=True)
class Suspect:
    """A number in the loss that seems to come from the batch.

    Attributes:
        place: where the script computes with it.
        sure: whether it has been seen to follow the batch, or can hardly be anything else.
    """

    place: Place
    sure: bool


class NumberWatch:
    """Follows Python numbers from one checked step to the next: one that follows the batch is no setting of the script."""

    def __init__(self) -> None:
        self._followed: dict[Any, set[float]] = defaultdict(set)
        self._values: dict[Any, set[Any]] = defaultdict(set)

    def look(self, replay: Replay, step: RealStep, exchanges: Iterable[Exchange]) -> Suspect | None:
        """Look for numbers in the loss that equal one of the batch, and that matter.

        Args:
            replay: the step, call by call.
            step: the step.
            exchanges: other samples.

        Returns:
            The first such number, or ``None``.
        """
        found: list[Suspect] = []
        explained: set[Any] = set()
        for exchange in exchanges:
            if exchange.extreme is not None:
                continue
            try:
                told = replay.told(exchange)
                for one in that_follow(replay.calls, told):
                    key = (one.place, *(k for _, k in one.changes))
                    explained.add(key)
                    if _is_the_batch_size(one.value, step.samples):
                        continue  # another number of the batch that equals it does so by chance
                    other = replay.with_numbers(exchange, one.changes)
                    if difference(replay.repeat(None), other, step, exchange.keep) is not None:
                        self._followed[key].add(one.value)
                        suspect = self._suspect(key, one)
                        found += [suspect] if suspect.sure or not one.written else []
            except NotFollowedError:
                continue
        found += [Suspect(key[0], sure=False) for key in self._changing(replay, step.samples) if key not in explained]
        return next((s for s in found if s.sure), found[0] if found else None)

    def _suspect(self, key: Any, one: Followed) -> Suspect:
        setting = one.written or looks_like_a_setting(one.told)
        return Suspect(one.place, sure=len(self._followed[key]) > 1 or not setting)

    def _changing(self, replay: Replay, samples: int) -> list[Any]:
        """Numbers that are not those of the steps before, in calls after the script has read a number of this batch."""
        read, out, models = False, [], 0
        for call in replay.calls:
            if isinstance(call, Call):
                read |= call.tells and not isinstance(call.result, bool)
                place, numbers = call.place, numbers_of(call)
            else:
                place, numbers, models = (NOWHERE, models), numbers_given(call), models + 1
            for k, value in numbers if read else ():
                one = tuple(value) if isinstance(value, (list, tuple)) else value
                weights = isinstance(one, tuple) and len(one) != samples and any(type(x) is float for x in one)
                if weights or not (isinstance(one, tuple) or _of_the_batch_size(one, samples)):
                    known = self._values[place, k]
                    if known and one not in known:
                        out.append((place, k))
                    known.add(one)
        return out


def _is_the_batch_size(value: float, samples: int) -> bool:
    return any(math.isclose(x, samples, rel_tol=1e-6) for x in _with_inverse(value))


def _of_the_batch_size(value: float, samples: int) -> bool:
    return any(abs(x / samples - round(x / samples)) < 1e-6 for x in _with_inverse(value) if abs(x) >= samples)


def _with_inverse(value: float) -> tuple[float, ...]:
    if not math.isfinite(value) or abs(value) < _TINY:
        return ()
    return value, 1 / value


_TINY = 1e-12

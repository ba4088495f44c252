"""What was released, told apart by the training that released it: the history that an accountant must hold.

The history of an accountant is a list that everything can write to. Here every training has an identifier and a history of
its own, so that histories are united instead of added up twice: of one training the longest one known counts.
"""

from __future__ import annotations

import copy
import math
import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from opacus import PrivacyEngine

from dpfix.errors import ArgumentError, CheckpointError
from dpfix.instrument.source import warn_user
from dpfix.report.statement import Stretch
from dpfix.sampling.population import Population
from dpfix.training.epsilon import Entry

NOT_A_NUMBER = math.nan
"""One object for every noise that is not a number, so that such entries can be counted."""
Settings = Counter[tuple[float, float]]
"""Numbers of steps by noise multiplier and sampling rate."""


@dataclass(eq=False)
class Releases:
    """What one training has released.

    Attributes:
        data: the records it drew from; ``None`` if unknown.
        stretches: its steps.
        name: tells trainings apart, also in other processes.
        process: in which process it goes on; a fork of it is another training.
        budget: the file that it writes into, if there is one.
        saved_units: as :attr:`Population.units`, of a saved state; ``None`` if it does not say.
    """

    data: Population | None = None
    stretches: list[Stretch] = field(default_factory=list)
    name: str = field(default_factory=lambda: secrets.token_hex(16))
    process: int = field(default_factory=os.getpid)
    budget: str | None = None
    saved_units: tuple[str, ...] | None = None

    @property
    def units(self) -> tuple[str, ...] | None:
        """Who it was accounted for; ``None`` if that is not known."""
        return self.saved_units if self.data is None else self.data.units

    def of_others_than(self, here: Population) -> bool:
        """Whether a saved state says that it was not accounted for the persons of a call, but for items or for others."""
        return self.saved_units is not None and bool(here.units) and not set(self.saved_units) & set(here.units)

    @property
    def steps(self) -> int:
        """How many they are."""
        return sum(s.steps for s in self.stretches)

    def add(self, stretch: Stretch) -> None:
        """Steps were made."""
        stretches = self.stretches
        if stretches and stretches[-1].setting == stretch.setting:
            stretch = Stretch(stretches.pop().steps + stretch.steps, *stretch.setting)
        stretches.append(stretch)


class Book:
    """Everything that an accountant must hold.

    Attributes:
        trainings: what was released, by name of the training, the earliest first.
        others: further steps that the accountant was seen to hold: of Opacus's own calls, or loaded into it.
        accountings: those of the trainings that go on here; before anybody reads the history, they count what was drawn.
    """

    def __init__(self) -> None:
        self.trainings: dict[str, Releases] = {}
        self.others: Settings = Counter()
        self.accountings: WeakSet[Any] = WeakSet()
        self._seen: tuple[Any, Any, int, Any] = (None, None, 0, None)

    def stretches(self) -> list[Stretch]:
        """All steps, the earliest first."""
        others = (Stretch(steps, *setting) for setting, steps in self.others.items())
        return joined([*others, *(s for releases in self.trainings.values() for s in releases.stretches)])

    # ------------------------------------------------------------------ the accountant

    def release(self, accountant: Any, releases: Releases, step: Stretch) -> None:
        """One step is being released.

        Args:
            accountant: the engine's, at present.
            releases: of the training that makes the step.
            step: its setting.

        Raises:
            ValueError: the accountant cannot count it; its history is as before.
        """
        if self._looks(accountant) != self._seen or accountant.history is not self._seen[1]:
            self.settle(accountant)
        history = accountant.history
        held, last = len(history), history[-1:]
        try:
            accountant.step(noise_multiplier=step.noise_multiplier, sample_rate=step.sampling_rate)
        except ValueError:
            history.extend(last[: held - len(history)])  # gdp forgets what it counted before it fails
            raise
        self.trainings.setdefault(releases.name, releases).add(step)
        self._seen = self._looks(accountant)

    def settle(self, accountant: Any) -> None:
        """Take notice of what others did to an accountant, and put back what it no longer holds.

        Args:
            accountant: the engine's, at present.
        """
        before = _valid(accountant.history)
        here, own = _counted(before), _counted(history_of(self.trainings.values()))
        more = here - own
        if self._seen[0] is not None:
            another, same_list = accountant is not self._seen[0], accountant.history is self._seen[1]
            renewed = not same_list and accountant.mechanism() != "gdp"  # which makes a new list on every step
            held = own + self.others
            if (another and here != held) or (renewed and here - held):
                more = here  # it has been elsewhere: its steps are others than these
        self.others = self.others | more
        lost = own + self.others - here
        if lost:
            warn_user(
                f"privacy_engine: its accountant does not hold {lost.total()} steps that were released and counted before: its "
                "history was emptied, replaced or taken back. Nothing takes a release back, and they are counted on. For "
                "other data use a new PrivacyEngine and a model that is not trained yet."
            )
        self._write(accountant, before)

    def _write(self, accountant: Any, before: list[Entry]) -> None:
        """Put what an accountant lacks in front of its history."""
        own = _counted(history_of(self.trainings.values()))
        missing = own + self.others - _counted(before)
        if missing:
            in_front = [(*setting, steps) for setting, steps in missing.items()]
            history = _entries(joined(Stretch(steps, *setting) for *setting, steps in in_front + before))
            if isinstance(accountant.history, list):
                accountant.history[:] = history  # two engines may share it
            else:
                accountant.history = history
        self._seen = self._looks(accountant)

    @staticmethod
    def _looks(accountant: Any) -> tuple[Any, Any, int, Any]:
        history = accountant.history
        return (accountant, history, len(history), history[-1]) if history else (accountant, history, 0, None)

    # ------------------------------------------------------------------ what was released elsewhere

    def missing(self, releases: Iterable[Releases]) -> list[Releases]:
        """Those of which the book does not hold every step."""
        return [r for r in releases if r.steps > self.steps_of(r.name)]

    def take(self, accountant: Any, releases: Iterable[Releases], others: Settings | None = None) -> None:
        """Count what was released elsewhere too, once.

        An accountant may have got a history already that its state had in a checkpoint: then the steps are those.

        Args:
            accountant: the engine's.
            releases: of trainings.
            others: further steps.

        Raises:
            ArgumentError: an accountant of kind ``gdp`` would hold steps of several settings.
        """
        self.settle(accountant)
        before, new, others = _valid(accountant.history), self.missing(releases), others or Counter()
        refuse_mixture(
            accountant, [*before, *history_of(new), *((*setting, steps) for setting, steps in others.items())]
        )
        for r in new:
            had = Counter() if r.name not in self.trainings else _counted(history_of([self.trainings[r.name]]))
            self.others = self.others - (_counted(history_of([r])) - had)
            if r.name in self.trainings:
                self.trainings[r.name].stretches = list(r.stretches)
        copies = {r.name: replace(r, stretches=list(r.stretches)) for r in new if r.name not in self.trainings}
        self.trainings = copies | self.trainings
        self.others = self.others | others
        self._write(accountant, before)

    def united(self, accountant: Any, releases: Iterable[Releases], others: Settings | None = None) -> list[Entry]:
        """The history that an accountant would have after :meth:`take`; nothing is changed.

        Args:
            accountant: the engine's.
            releases: of trainings.
            others: further steps.

        Returns:
            Noise multiplier, sampling rate and number of steps of every entry.

        Raises:
            ArgumentError: an accountant of kind ``gdp`` would hold steps of several settings.
        """
        self.settle(accountant)
        trial, then = Book(), copy.deepcopy(accountant)
        trial.trainings = {name: replace(r, stretches=list(r.stretches)) for name, r in self.trainings.items()}
        trial.others = self.others.copy()
        trial.take(then, releases, others)
        return list(then.history)

    def steps_of(self, name: str) -> int:
        """Steps of the training of that name."""
        return self.trainings[name].steps if name in self.trainings else 0

    def put_back(self) -> Callable[[], None]:
        """A function that makes the book what it is now."""
        trainings, others, seen = dict(self.trainings), self.others.copy(), self._seen
        stretches = {name: list(r.stretches) for name, r in trainings.items()}

        def undo() -> None:
            self.trainings, self.others, self._seen = trainings, others, seen
            for name, r in trainings.items():
                r.stretches = stretches[name]

        return undo

    # ------------------------------------------------------------------ plain values

    def state(self) -> dict[str, Any]:
        """The book as plain values."""
        return {
            "trainings": {
                r.name: [[s.steps, *s.setting] for s in r.stretches] for r in self.trainings.values() if r.steps
            },
            "others": [[steps, *setting] for setting, steps in self.others.items()],
            "units": {r.name: list(r.units) for r in self.trainings.values() if r.steps and r.units is not None},
        }


def read_state(state: Any) -> tuple[list[Releases], Settings]:
    """What :meth:`Book.state` wrote.

    Args:
        state: plain values, of a file that may be damaged.

    Returns:
        Trainings, and further steps.

    Raises:
        CheckpointError: they are not what a book writes.
    """
    try:
        trainings, others = dict(state["trainings"]), list(state["others"])
        units = {name: tuple(map(str, of)) for name, of in dict(state.get("units", {})).items()}
        read = [
            Releases(None, [_read(*s) for s in rows], _name(name), saved_units=units.get(name))
            for name, rows in trainings.items()
            if rows
        ]
        return read, _counted(_entries(_read(*row) for row in others))
    except (TypeError, ValueError, KeyError, IndexError, OverflowError, AttributeError) as error:
        raise CheckpointError(
            f"the history of releases in the state of the optimizer cannot be read: {error}.",
            "Without it, epsilon would leave out what was released before.",
            "The file is damaged, or was changed; take another one.",
            path="optimizer",
        ) from error


def _name(name: Any) -> str:
    if not isinstance(name, str):
        raise TypeError(f"a training is called {name!r}")
    return name


def _read(steps: Any, noise: Any, rate: Any, clip: Any = None) -> Stretch:
    numbers = isinstance(noise, (int, float)) and isinstance(rate, (int, float))
    if not numbers or not isinstance(steps, int) or isinstance(steps, bool) or steps < 1 or noise < 0 or not rate > 0:
        raise ValueError(f"{steps!r} steps with noise {noise!r} and rate {rate!r}")
    return Stretch(steps, float(noise), float(rate), clip)


def refuse_mixture(accountant: Any, entries: Iterable[Entry]) -> None:
    """Refuse an accountant that cannot add up steps of several settings.

    Args:
        accountant: the engine's.
        entries: what it would hold.

    Raises:
        ArgumentError: it is of kind ``gdp``, and the settings differ.
    """
    settings = _counted(entries)
    if len(settings) > 1 and accountant.mechanism() == "gdp":
        found = ", ".join(f"noise {noise:g} with rate {rate:.3g}" for noise, rate in settings)
        raise ArgumentError(
            f"privacy_engine: its accountant is 'gdp', and what was released has several settings: {found}.",
            "That accountant reads the last setting only, so that its epsilon would leave out the others.",
            "Use PrivacyEngine(accountant='prv') or 'rdp'.",
            path="privacy_engine",
        )


_BOOKS: WeakKeyDictionary[PrivacyEngine, Book] = WeakKeyDictionary()


def book_of(engine: PrivacyEngine) -> Book:
    """The book of a privacy engine, for as long as the engine lives."""
    return _BOOKS.setdefault(engine, Book())


def settled(engine: PrivacyEngine) -> Any:
    """The accountant of an engine, with everything that was released.

    Args:
        engine: a privacy engine.

    Returns:
        Its accountant; what it no longer held is put back, with a warning.
    """
    if engine in _BOOKS:
        for accounting in tuple(_BOOKS[engine].accountings):
            accounting.complete()
            accounting.name_skipped()
        _BOOKS[engine].settle(engine.accountant)
    return engine.accountant


# ------------------------------------------------------------------ lists of steps


def joined(stretches: Iterable[Stretch]) -> list[Stretch]:
    """Equal steps in a row as one stretch."""
    together = Releases()
    for stretch in stretches:
        together.add(stretch)
    return together.stretches


def history_of(releases: Iterable[Releases]) -> list[Entry]:
    """The steps of trainings as in the history of an accountant."""
    return [entry for r in releases for entry in _entries(r.stretches)]


def _entries(stretches: Iterable[Stretch]) -> list[Entry]:
    return [(s.noise_multiplier, s.sampling_rate, s.steps) for s in stretches]


def _counted(entries: Iterable[Entry]) -> Settings:
    counts: Settings = Counter()
    for noise, rate, steps in entries:
        counts[noise if noise == noise else NOT_A_NUMBER, rate] += steps
    return counts


def _valid(history: Any) -> list[Entry]:
    """The entries of a history that are entries."""
    return [entry for entry in map(_entry, history) if entry] if isinstance(history, (list, tuple)) else []


def _entry(values: Any) -> Entry | None:
    try:
        noise, rate, steps = values
        return (float(noise), float(rate), int(steps)) if steps > 0 else None
    except (TypeError, ValueError, OverflowError):
        return None

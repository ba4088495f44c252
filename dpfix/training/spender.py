"""One training, as it writes into the file of a budget.

The file never holds less than was released. A step is written before its noise is drawn; so that a step costs no writing,
releases are reserved in blocks: "this training may make so many more". A block holds :data:`AHEAD` releases, or an eighth of
those that the training has made, if that is more. What counts is what was released and what is reserved. A training that ends,
or whose process ends by itself, gives back what it has not used; a killed one cannot, and the rest of its block stays spent.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from multiprocessing.util import Finalize
from typing import Any

from opacus import PrivacyEngine

from dpfix.errors import ArgumentError, BudgetError
from dpfix.instrument.source import warn_user
from dpfix.report.statement import NOT_COVERED, SELECTION, SELECTION_WITH_BUDGET
from dpfix.sampling.people import unit_in_words
from dpfix.sampling.population import Population
from dpfix.scan.request import Request
from dpfix.scan.values import shown
from dpfix.training.budget import OPEN, Account, Budget
from dpfix.training.budget_file import Content, Line, counted, gone
from dpfix.training.budget_lock import one_at_a_time
from dpfix.training.epsilon import Entry
from dpfix.training.lineage import lineage_of
from dpfix.training.releases import Releases, book_of, history_of

AHEAD = 16
"""Releases of a block at least."""
SHARE = 8
"""A block is at most this part of what the training has released, if that is more."""

_STAYS_SPENT = "what a training has reserved of its budget and not used stays spent"
_AT_END = set[int]()
"""Processes that give back when multiprocessing ends them."""


class Spender:
    """One training, as it writes into the file of a budget.

    It has no ``__dict__``, so that a call that is undone (:class:`dpfix.instrument.memento.Memento`) takes back nothing of it.

    Args:
        account: of the budget of the data.
        samples: number of records of the training's data set.
        unit: whose privacy the training is about, in words, and digests of the persons.
        model: class name of the model.
        earlier: other trainings whose releases the model holds; those that the file does not know are written too.

    Attributes:
        apart: names of earlier trainings on other records of the data set, which the call's accountant does not hold.
        name: of the training; empty before :meth:`begin`.
        process: in which it goes on.
        over: whether it has ended.
    """

    __slots__ = (
        "_ahead",
        "_begun",
        "_earlier",
        "_model",
        "_samples",
        "_unit",
        "_used",
        "_writes",
        "account",
        "apart",
        "name",
        "over",
        "process",
    )

    def __init__(self, account: Account, samples: int, unit: str, model: str, earlier: Iterable[Releases] = ()) -> None:
        self.account, self._samples, self._unit, self._model = account, samples, unit, model
        self._earlier, self.apart = list(earlier), set[str]()
        self.name, self.process, self.over = "", os.getpid(), False
        self._begun = datetime.now(UTC).isoformat(timespec="seconds")
        self._used: Counter[tuple[float, float]] = Counter()
        self._ahead: Entry | None = None
        self._writes = -1

    def cited(self) -> str:
        """What a statement says about the budget."""
        account = self.account
        try:
            content = account.read()
        except BudgetError as error:
            return f"not known: {error.findings[0].fact}"
        known = self.name in content.trainings
        return (
            f"({account.loss(content.history):.4g}, {account.delta:.3g})-differential privacy for all {len(content.trainings)} "
            f"training(s) in {account.file.path}, of epsilon {account.epsilon:g}; this one is "
            + (self.name if known else "not in it yet")
        )

    @staticmethod
    def not_covered() -> tuple[str, ...]:
        """What a guarantee does not speak about, where the trainings of which one was chosen are in the file."""
        return tuple(SELECTION_WITH_BUDGET if item is SELECTION else item for item in NOT_COVERED)

    def begin(self, name: str) -> Spender:
        """The training begins; nothing is written before its first release.

        Args:
            name: tells trainings apart.

        Returns:
            What writes for it; another one than this where a fork goes on with a training.
        """
        if self.name:
            return Spender(self.account, self._samples, self._unit, self._model, self._earlier).begin(name)
        atexit.unregister(_at_exit)
        atexit.register(_at_exit)
        self.name, self.process = name, os.getpid()
        if self.process not in _AT_END:  # a process of multiprocessing ends without the functions of atexit
            _AT_END.add(self.process)
            Finalize(None, _at_exit, exitpriority=0)
        OPEN.append(self)
        return self

    def line(self, ahead: Entry | None = None) -> Line:
        """The training as it is to stand in the file."""
        return Line(self._model, self._begun, tuple((*s, steps) for s, steps in list(self._used.items())), ahead)

    def add_earlier(self, releases: Iterable[Releases]) -> None:
        """The model holds what these trainings released, too; it is written with the next step."""
        with one_at_a_time():
            self._earlier += releases
            self._ahead = None

    # ------------------------------------------------------------------ before and at a release

    def check(self, setting: tuple[float, float], steps: int, what: str) -> None:
        """That the file is that of the data, and has room; nothing is written.

        Args:
            setting: noise multiplier and rate of the releases to come.
            steps: their number.
            what: they are, for a refusal.

        Raises:
            BudgetError: it is not, or has none.
        """
        content = self._checked(self.account.read())
        if not self.account.room(content.history, setting, steps, steps):
            raise self.account.refusal(content, setting, steps, what)

    def together(self, history: Iterable[Entry]) -> list[Entry]:
        """What an accountant holds and what the file holds; a training that both know counts once.

        Args:
            history: of the call's accountant.

        Returns:
            The history of everything.
        """
        settings = Counter({entry[:2]: entry[2] for entry in counted(history)})
        for entry in history_of(r for r in self._earlier if r.name not in self.apart):
            settings[entry[:2]] -= entry[2]  # the file has them, or is about to have them
        file = self._checked(self.account.read()).history
        return counted([*file, *((*setting, steps) for setting, steps in settings.items() if steps > 0)])

    def reserve(self, setting: tuple[float, float], least: int) -> None:
        """The next releases are in the file when this returns.

        Args:
            setting: noise multiplier and rate of the next one.
            least: how many.

        Raises:
            BudgetError: they would go beyond the budget, or cannot be written; the file is as it was.
        """
        with one_at_a_time():
            if self._left(setting) >= least:
                return
            self._goes_on()
            most = max(least, AHEAD, sum(self._used.values()) // SHARE)

            def with_block(now: Content | None) -> Content:
                content = self._present(now).with_lines({self.name: self.line()})
                room = self.account.room(content.history, setting, least, most)
                if not room:  # perhaps with what others in this process do not need at once
                    others = [s for s in self.account.own() if s is not self and s._ahead is not None]
                    content = content.with_lines({s.name: s.line() for s in others})
                    room = self.account.room(content.history, setting, least, most) if others else 0
                    if not room:
                        raise self.account.refusal(content, setting, least, "this step")
                    for other in others:
                        other._ahead = None
                return content.with_lines({self.name: self.line((*setting, room))})

            self._ahead = self._write(with_block)

    def release(self, setting: tuple[float, float]) -> None:
        """A release leaves, or has left already: it counts whatever the budget says.

        Args:
            setting: its noise multiplier and rate.

        Raises:
            BudgetError: it is not in the file, and cannot be written.
        """
        with one_at_a_time():
            if self._left(setting) < 1:
                self._goes_on()
                block = (*setting, 1)
                self._ahead = self._write(lambda now: self._present(now).with_lines({self.name: self.line(block)}))
            assert self._ahead is not None
            noise, rate, left = self._ahead
            self._used[setting] += 1  # first: an interrupt in between counts one too many
            self._ahead = (noise, rate, left - 1)

    def end(self) -> None:
        """The training is over: give back what is reserved and was not used; it stays spent where that cannot be written."""
        try:
            self._give_back()
        except BudgetError as error:
            warn_user(f"{_STAYS_SPENT}: {error}")

    def _give_back(self) -> None:
        with one_at_a_time():
            if self.process == os.getpid() and self in OPEN:
                self.over = True
                if self._writes >= 0:
                    self._ahead = self._write(self._present)
                else:
                    OPEN.remove(self)

    def let_go(self) -> None:
        """Nobody has the training any more; its rest is given back when this process writes the next time, or ends."""
        self.over = True

    def _goes_on(self) -> None:
        """It writes again: a call that had ended it was undone, say."""
        self.over = False
        if self not in OPEN:
            OPEN.append(self)

    def _left(self, setting: tuple[float, float]) -> int:
        """How many releases of a setting the block holds; more noise and smaller rates lose less."""
        if self._ahead is None or not (setting[0] >= self._ahead[0] and setting[1] <= self._ahead[1]):
            return 0
        return self._ahead[2]

    def _write(self, change: Callable[[Content | None], Content]) -> Entry | None:
        content = self.account.file.update(change)
        assert content is not None
        self._writes = content.writes
        self.account.writes = max(self.account.writes, content.writes)
        for s in self.account.own():
            if s.over:
                with suppress(ValueError):  # another thread may have been faster
                    OPEN.remove(s)
        line = content.trainings.get(self.name)
        return None if line is None else line.ahead

    def _present(self, now: Content | None) -> Content:
        """The present content, checked, with the lines of this process's trainings that are over as they ended."""
        now = self.account.goes_on(now, max(self.account.writes, self._writes))
        if self._writes >= 0 and self.name not in now.trainings:
            raise BudgetError(*gone(self.account.file.path.name), path="budget")
        return self._checked(now).with_lines({
            s.name: s.line() for s in self.account.own() if s.over and (s is self or s.name in now.trainings)
        })

    def _checked(self, content: Content) -> Content:
        if content.samples is None:
            content = replace(content, samples=self._samples, unit=self._unit)
        fits = self._samples <= content.samples if content.parts else self._samples == content.samples  # type: ignore[operator]
        words, persons = _parted(content.unit)
        mine, own = _parted(self._unit)
        if fits and words == mine and persons and own and not content.parts and not persons & own:
            raise BudgetError(
                f"{self.account.file.path.name} is the budget of other persons: {mine} puts the items of this data set together "
                "otherwise than the trainings before did.",
                "What was released about one person then and what is released now does not add up to a number about either.",
                "Name the persons as before, or take another file and add both epsilons up.",
                path="budget",
            )
        if not fits or (words and words != mine):
            raise BudgetError(
                f"{self.account.file.path.name} is the budget of {content.samples} samples (unit: "
                f"{words or mine}), and data_loader reads a data set of {self._samples} (unit: {mine}).",
                "A budget speaks about one data set.",
                "Name the file of this data set. Where both are parts of one data set, say once how many records that has: "
                "dpfix.Budget(path, samples=...).",
                path="budget",
            )
        unknown = {}
        for r in self._earlier:
            known = content.trainings.get(r.name)
            if r.steps and r.name != self.name and (known is None or known.steps < r.steps):
                unknown[r.name] = Line("(trained before)", "", tuple(counted(history_of([r]))))
        return replace(content, unit=content.unit if persons else self._unit).with_lines(unknown)


def spender_for(budget: Any, request: Request, engine: PrivacyEngine, earlier: Sequence[Releases]) -> Spender | None:
    """What writes into the budget of a call.

    Args:
        budget: as the script gave it.
        request: the call.
        engine: the call's; what its accountant holds of the same data belongs into the file.
        earlier: trainings whose releases the model holds.

    Returns:
        It, or ``None`` without a budget.

    Raises:
        ArgumentError: ``budget`` is no budget.
    """
    if budget is None:
        if files := sorted({r.budget for r in earlier if r.budget is not None}):
            warn_user(
                f"budget: this model was trained with the budget in {files[0]} on the same data, and this call has none: what "
                "it releases will be missing in the file, whose epsilon is then too small. Pass budget= to this call too."
            )
        return None
    if not isinstance(budget, Budget):
        raise ArgumentError(
            f"budget={shown(budget)} is no dpfix.Budget.",
            help="Pass budget=dpfix.Budget('data.budget.json', epsilon=8.0, delta=1e-6).",
            path="budget",
        )
    here = Population(request.data_loader)
    held = (*book_of(engine).trainings.values(), *lineage_of(request.module), *earlier)
    known = sorted(held, key=lambda r: r.steps)
    same = {r.name: r for r in known if r.data is None or here.same_data_as(r.data)}  # the longest one of every name
    unit, digests = unit_in_words(request.data_loader), here.units_of_all
    if digests:
        unit += f"{_PERSONS} {' '.join(digests)}"
    spender = Spender(budget._account, here.samples, unit, type(request.module).__name__, same.values())
    spender.apart = same.keys() - book_of(engine).trainings.keys() - {r.name for r in earlier}
    return spender


_PERSONS = "; persons"
"""Stands in a file between the words for a unit and the digests of who has which items, if every item was drawn from."""


def _parted(unit: str) -> tuple[str, set[str]]:
    words, _, digests = unit.partition(_PERSONS)
    return words, set(digests.split())


def _at_exit() -> None:
    for s in tuple(OPEN):
        try:
            s._give_back()
        except BudgetError as error:
            with suppress(ValueError):  # what was said once is not said again
                OPEN.remove(s)
            try:
                warn_user(f"{_STAYS_SPENT}: {error}")
            except Warning as warning:  # made an error by a filter, it would keep the others from giving back
                print(warning, file=sys.stderr)

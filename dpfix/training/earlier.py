"""What was released before a call: with the model's parameters, or as the optimizer's loaded state says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from opacus import PrivacyEngine
from torch import nn
from torch.utils.data import DataLoader

from dpfix.errors import ArgumentError, DPFixError
from dpfix.instrument.source import warn_user
from dpfix.report.finding import Finding
from dpfix.sampling.population import Population
from dpfix.training.epsilon import Entry
from dpfix.training.lineage import lineage_of, remember
from dpfix.training.releases import Releases, Settings, book_of, read_state

ENTRY = "dpfix"
"""Under this key the saved state of an optimizer has the releases, in its first group: torch's optimizers keep it there."""


@dataclass(frozen=True)
class Earlier:
    """What was released before a call, about some of the records that it draws from.

    Attributes:
        held: by the model's parameters.
        loaded: as the state says that was loaded into the optimizer.
        others: further steps of that state.
        here: the records that the call draws from.
    """

    held: list[Releases]
    loaded: list[Releases]
    others: Settings
    here: Population

    @property
    def releases(self) -> list[Releases]:
        """All trainings."""
        return [*self.held, *self.loaded]

    def history(self, engine: PrivacyEngine) -> list[Entry]:
        """What the accountant of an engine will hold before the call's first step; nothing is changed.

        Returns:
            Noise multiplier, sampling rate and number of steps of every entry.

        Raises:
            ArgumentError: the accountant cannot add up steps of several settings, or steps that were counted for other units.
        """
        refuse_units_of(self.loaded, self.here, ArgumentError)
        counted = [r for r in book_of(engine).trainings.values() if r.data is not None and r.steps]
        for r in [*self.held, *counted]:
            if r.data is not None and r.data.splits_a_unit_of(self.here):
                refuse_other_units(r.steps, "were accounted for each item of a person alone", "accounts for persons")
        for r in counted:
            if r.data is not None and self.here.splits_a_unit_of(r.data):
                refuse_other_units(r.steps, "were accounted for persons", "accounts for each item alone")
        return book_of(engine).united(engine.accountant, self.releases, self.others)

    def carry_on(self, engine: PrivacyEngine, optimizer: Any, given: bool) -> tuple[Finding, ...]:
        """Put it into the accountant of an engine, unless it is there.

        Args:
            engine: the call's.
            optimizer: the private optimizer.
            given: whether the script has given the engine.

        Returns:
            Advice where steps were added.
        """
        book = book_of(engine)
        steps = sum(r.steps for r in book.missing(self.held))
        book.take(engine.accountant, self.releases, self.others)
        remember(optimizer.params, [book.trainings[r.name] for r in self.releases])
        optimizer.param_groups[0].pop(ENTRY, None)
        if not steps:
            return ()
        fact = f"this model's weights hold {steps} private steps on the same data already; epsilon counts them too."
        if given:
            warn_user(
                f"privacy_engine does not hold what was released before: {fact} Pass the privacy_engine of the earlier call, "
                "or none. A training that begins anew needs a model that is not trained yet."
            )
        return (
            Finding.advice(
                "DPF033",
                fact,
                "what this training releases adds to what the weights hold.",
                help="A training that begins anew needs a model that is not trained yet.",
                path="module",
            ),
        )


def earlier_releases(module: nn.Module, optimizer: Any, loader: DataLoader[Any]) -> Earlier:
    """What was released before a call.

    Args:
        module: the model.
        optimizer: the script's own optimizer.
        loader: the script's loader.

    Returns:
        Trainings on data that this loader draws from too. A state that was loaded is the same training's, on the same data.
    """
    here = Population(loader)
    held = [r for r in lineage_of(module) if r.data is None or here.overlaps(r.data)]
    entry = entry_of({"param_groups": optimizer.param_groups})
    loaded, others = ([], Settings()) if entry is None else read_state(entry)
    return Earlier(held, [replace(r, data=here) for r in loaded], others, here)


def refuse_units_of(loaded: Iterable[Releases], here: Population, error: type[DPFixError]) -> None:
    """What a saved state says was released has to be accounted for the persons of the call.

    Args:
        loaded: trainings of the state.
        here: the records that the call draws from.
        error: what is raised.
    """
    for r in loaded:
        if r.of_others_than(here):
            refuse_other_units(
                r.steps, "were accounted for other units when they were saved", "accounts for persons", error
            )


def refuse_other_units(steps: int, before: str, now: str, error: type[DPFixError] = ArgumentError) -> NoReturn:
    """Steps that were counted for other units than the call's cannot be added up with it.

    Args:
        steps: how many they are.
        before: how they were counted, in words.
        now: what the call does, in words.
        error: what is raised.

    Raises:
        error: always.
    """
    raise error(
        f"privacy_unit: {steps} steps on the same data {before}, and this call {now}.",
        "One epsilon cannot speak of both: what a person's items lose one by one is less than what she loses.",
        "Name the same persons in every call, or begin anew with a model that is not trained yet and a new privacy_engine.",
        path="privacy_unit",
    )


# ------------------------------------------------------------------ the state of an optimizer


def with_entry(state: Mapping[str, Any], entry: Any) -> dict[str, Any]:
    """The state of an optimizer, with an entry of ours in a copy of its first group."""
    first, *others = state["param_groups"]
    return {**state, "param_groups": [{**first, ENTRY: entry}, *others]}


def without_entry(state: Any) -> Any:
    """The state of an optimizer without our entry; the one that is given stays as it is."""
    if entry_of(state) is None:
        return state
    first, *others = state["param_groups"]
    return {**state, "param_groups": [{k: v for k, v in first.items() if k != ENTRY}, *others]}


def entry_of(state: Any) -> Any:
    """Our entry in the state of an optimizer; ``None`` if there is none."""
    groups = state.get("param_groups") if isinstance(state, Mapping) else None
    return groups[0].get(ENTRY) if groups else None


def steps_shown(state: Mapping[str, Any]) -> int:
    """How many steps the state of an optimizer shows at least: what it has counted itself, or one where it keeps averages."""
    shown = 0
    for values in state.get("state", {}).values():
        counted = values.get("step") if isinstance(values, Mapping) else None
        shown = max(shown, int(counted) if counted is not None else int(any(v is not None for v in values.values())))
    return shown

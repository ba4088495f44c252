"""Which rows of a batch belong to which sample, where a sample enters the model as several."""

from __future__ import annotations

from torch import nn

from dpfix.errors import LoaderError, TrainingStepError
from dpfix.layout.row_count import RowCounter, find_row_counters
from dpfix.observe.probe import Probe
from dpfix.observe.record import StepRecord
from dpfix.observe.training_step import TrainingStep
from dpfix.sampling.collate import KnownRows
from dpfix.sampling.people import people_of
from dpfix.scan.request import Request


def row_counter(request: Request, samples: Probe, counts: tuple[int, ...], step: TrainingStep) -> RowCounter | None:
    """How the loader tells the rows of every sample, where these are not the same for all."""
    if not counts:
        return None
    counter = next(iter(find_row_counters(samples.items, counts)), None)
    rows = f"the probe's samples enter {type(request.module).__name__} as {', '.join(map(str, counts))} rows"
    if counter is None and people_of(request.data_loader) is not None:
        has = [RowCounter(()).count(item) for item in samples.items]
        raise LoaderError(
            f"data_loader: the probe's persons have {', '.join(map(str, has))} items, and enter "
            f"{type(request.module).__name__} as {', '.join(map(str, counts))} rows.",
            "Which rows are whose can be told only if every item becomes one row, in their order.",
            "Leave no item out in the collate_fn, nor in training_step.",
            path="data_loader",
        )
    if counter is None:
        raise LoaderError(
            f"data_loader: {rows},",
            "and nothing in what the dataset returns has that many entries, so it cannot be told which rows belong to which "
            "sample.",
            "Return a list with one entry per row from dataset[i] (and flatten it in the collate_fn), or give every sample "
            "the same number of rows.",
            path="data_loader",
        )
    if (
        not step.loss_known and people_of(request.data_loader) is None
    ):  # the loop knows no persons: all rows weigh the same
        raise TrainingStepError(
            f"training_step: {rows}, and neither criterion= nor training_step= was given.",
            "Whether the loss gives every row the same weight, or every sample, decides what is clipped.",
            "Pass the loop's criterion or training_step.",
            path="training_step",
        )
    if not request.privacy.poisson_sampling:
        raise LoaderError(
            f"data_loader: {rows}.",
            "Which rows belong to which sample is known for the batches of a private loader only.",
            "Leave poisson_sampling at True, or give every sample the same number of rows.",
            path="data_loader",
        )
    return counter


def rows_averaged(request: Request, samples: Probe, counts: tuple[int, ...]) -> int:
    """How many rows of every sample are averaged, where that is the same number for all: views, or items of a person."""
    if people_of(request.data_loader) is None or counts:
        return request.views
    return max(1, RowCounter(()).count(samples.items[0]))


def known_rows(samples: Probe, record: StepRecord) -> KnownRows | None:
    """What the loader has to look at, where samples enter the model as several rows, or could do so."""
    rows = record.rows_per_sample
    counters = find_row_counters(samples.items, record.counts or (rows,) * len(samples))
    if rows == 1 and not record.counts:  # a length of 1 somewhere inside says little; an item that is a list says it
        counters = [c for c in counters if not c.path and c.dim == 0 and isinstance(samples.items[0], (list, tuple))]
    return KnownRows(None if record.counts else rows, tuple(counters)) if counters else None


def check_rows(module: nn.Module, looked_at: KnownRows | None, found: KnownRows | None) -> None:
    """Rows of a sample have to be counted from the first batch on.

    Args:
        looked_at: what the loader sees in every sample.
        found: what it has to see, as a real call has shown.

    Raises:
        TrainingStepError: that is something else.
    """
    if found is not None and found != looked_at:
        raise TrainingStepError(
            f"samples enter {type(module).__name__} as several rows, which only the loop's own call has shown,",
            "so the loader has not counted the rows of this batch. No parameter has moved.",
            "Pass training_step=lambda model, batch: <the loss your loop computes> to make_private_safe.",
            path="training_step",
        )

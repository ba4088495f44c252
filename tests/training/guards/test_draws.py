"""One step per Poisson draw, with the rows that were drawn."""

from __future__ import annotations

from torch.utils.data import DataLoader

import dpfix
from tests.helpers import points
from tests.training.steps import every_engine, first_batch, loss_of, refused, start


@every_engine
def test_accumulated_batches_are_refused(engine: str) -> None:
    model, training = start(engine)

    def act() -> None:
        for _, batch in zip(range(2), training[2], strict=False):
            loss_of(training, batch).backward()
        training[1].step()

    refused(model, dpfix.AccumulationError, "backward pass", act)


@every_engine
def test_rows_of_the_original_loader_are_refused(engine: str) -> None:
    data = DataLoader(points(), batch_size=8)
    model, training = start(engine, data_loader=data)
    loss_of(training, next(iter(data))).backward()
    refused(model, dpfix.ForeignBatchError, "data_loader that make_private_safe returned", training[1].step)


@every_engine
def test_repeated_and_filtered_rows_are_refused(engine: str) -> None:
    model, training = start(engine)
    for rows in (lambda t: t.repeat_interleave(2, 0), lambda t: t[:-1]):
        x, y = first_batch(training)
        training[1].zero_grad()
        loss_of(training, (rows(x), rows(y))).backward()
        refused(model, dpfix.ForeignBatchError, "drew", training[1].step)


@every_engine
def test_second_step_on_a_batch_is_refused(engine: str) -> None:
    model, training = start(engine)
    batch = first_batch(training)
    loss_of(training, batch).backward()
    training[1].step()
    training[1].zero_grad()
    loss_of(training, batch).backward()
    refused(model, dpfix.ForeignBatchError, "without a new batch", training[1].step)


@every_engine
def test_step_without_backward_is_refused(engine: str) -> None:
    model, training = start(engine)
    first_batch(training)
    refused(model, dpfix.MisuseError, "no per-sample gradient", training[1].step)

"""A failure of the user's training step says what was being tried."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dpfix.errors import USER_CODE_ERRORS, DPFixError, TrainingStepError
from dpfix.observe.training_step import TrainingStep, UnknownCallError


@contextmanager
def described_failures(step: TrainingStep) -> Iterator[None]:
    """Turn an error of the user's step into one that says what was being tried.

    Yields:
        Nothing.

    Raises:
        TrainingStepError: the step raised something that is no refusal of dpfix; an ``UnknownCallError`` if it was guessed.
        DPFixError: a refusal, as it is.
    """
    try:
        yield
    except DPFixError:
        raise
    except USER_CODE_ERRORS as error:
        kind = UnknownCallError if step.guessed else TrainingStepError
        raise kind(
            f"the training step ({step.origin}) fails on a probe of a few samples, or on a single one:",
            f"{type(error).__name__}: {error} ({_last_line(error)}).",
            "Check training_step= and criterion=, and that the model runs on one batch and on a single sample before it is "
            "made private.",
            path="training_step",
        ) from error


def _last_line(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace is not None else "place unknown"

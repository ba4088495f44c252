"""Running the user's training step outside the loop: failures are described, lazy modules created."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from dpfix.errors import DPFixError, ModelError, TrainingStepError
from dpfix.probe import Probe
from dpfix.training_step import TrainingStep


@contextmanager
def described_failures(step: TrainingStep) -> Iterator[None]:
    """Turn an error of the user's step into one that says what was being tried.

    Args:
        step: the training step.

    Yields:
        Nothing.

    Raises:
        TrainingStepError: the step raised something that is no refusal of dpfix.
        DPFixError: a refusal, as it is.
    """
    try:
        yield
    except DPFixError:
        raise
    except (
        RuntimeError,
        TypeError,
        ValueError,
        IndexError,
        KeyError,
        AttributeError,
        AssertionError,
    ) as error:
        raise TrainingStepError(
            f"the training step ({step.origin}) fails on a probe of a few samples, or on a single one: "
            f"{type(error).__name__}: {error} ({_last_place(error)}). Check training_step= and criterion=, and that the "
            "model runs on one batch and on a single sample before it is made private."
        ) from error


def _last_place(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace is not None else "place unknown"


def materialise(module: nn.Module, step: TrainingStep, probe: Probe) -> bool:
    """Let lazy modules create their parameters, by one forward pass of the training step.

    The initialisers draw from the script's generators as its own first forward pass would have.

    Args:
        module: the model.
        step: from batch to loss.
        probe: the samples.

    Returns:
        Whether there was anything to create.

    Raises:
        ModelError: a parameter is still without shape.
    """
    if not _lazy(module):
        return False
    with described_failures(step), torch.enable_grad():
        step.run(module, probe.batch)
    left = _lazy(module)
    if left:
        raise ModelError(
            f"module: lazy parameter `{left[0]}` of {type(module).__name__} was not created by one training step. "
            "Run one forward pass that uses it before make_private_safe, or remove the layer."
        )
    return True


def _lazy(module: nn.Module) -> list[str]:
    lazy = (nn.parameter.UninitializedParameter, nn.parameter.UninitializedBuffer)
    return [n for n, t in (*module.named_parameters(), *module.named_buffers()) if isinstance(t, lazy)]

"""Running the user's training step outside the loop: failures are described, lazy modules created."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin, is_lazy

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


def remembered_lazy(module: nn.Module) -> Callable[[], None]:
    """What gives lazy modules back their state before they created their parameters.

    Args:
        module: the model.

    Returns:
        A function that makes every lazy module, and every parameter without shape, again what it is now.
    """
    modules = [m for m in module.modules() if isinstance(m, LazyModuleMixin)]
    inner = (
        "_parameters",
        "_buffers",
        "_forward_pre_hooks",
        "_forward_pre_hooks_with_kwargs",
        "_load_state_dict_pre_hooks",
    )
    before = [(m, type(m), dict(vars(m)), {name: dict(vars(m)[name]) for name in inner}) for m in modules]
    tensors = [
        t for m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None and is_lazy(t)
    ]
    shapeless = [(t, type(t), t.data) for t in tensors]

    def undo() -> None:
        for m, cls, attributes, containers in before:
            m.__class__ = cls
            vars(m).clear()
            vars(m).update(attributes)
            for name, content in containers.items():
                vars(m)[name].clear()
                vars(m)[name].update(content)
        for t, cls, data in shapeless:
            t.data = data
            t.__class__ = cls  # pyright: ignore[reportAttributeAccessIssue]

    return undo


def _lazy(module: nn.Module) -> list[str]:
    return [n for n, t in (*module.named_parameters(), *module.named_buffers()) if t is not None and is_lazy(t)]

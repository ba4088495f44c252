"""What every engine is: a way to obtain the per-sample gradients of one training step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from dpfix.instrument.sharded import Shards
from dpfix.plan import Plan


@dataclass(frozen=True)
class Verdict:
    """Whether an engine can work with a model.

    Attributes:
        reason: what keeps it out; empty if nothing does.
    """

    reason: str = ""

    def __bool__(self) -> bool:
        return not self.reason


def batches_of_tensors(record: Any) -> Verdict:
    """Whether an engine that takes all samples at once can work with a model: it is known which rows are whose."""
    lists = any(call.lists for call in record.calls)
    return Verdict(record.layout_problem or ("the model takes a list of samples" if lists else ""))


class Handle(ABC):
    """An engine at work on one model.

    Attributes:
        model: what the training step calls.
        counts: gives the rows of every sample in the present batch; nothing where all have the same number.
        clips: whether :meth:`clip_and_accumulate` clips without per-sample gradients on ``grad_sample``.
        several_iterations: whether several backward passes may come before one step.
        shards: the parameters of a model that is spread over processes; ``None`` for others.
    """

    shards: Shards | None = None
    model: nn.Module
    counts: Callable[[], tuple[int, ...]]
    clips: bool = False
    several_iterations: bool = True

    @abstractmethod
    def collect(self, parameters: list[nn.Parameter]) -> list[int]:
        """Leave per-sample gradients of shape ``[samples, *parameter]`` on ``grad_sample``.

        A parameter that no gradient reached gets zeros. Accumulated iterations become a list, as in Opacus.

        Returns:
            Number of samples of every accumulated iteration; empty if no gradient arrived at all.
        """

    def announce(self, parameters: list[nn.Parameter]) -> list[int]:
        """As :meth:`collect`; an engine that clips only leaves what tells the number of iterations.

        Returns:
            Number of samples of every accumulated iteration; empty if no gradient arrived at all.
        """
        return self.collect(parameters)

    def clip_and_accumulate(
        self, parameters: list[nn.Parameter], max_grad_norm: float, *, keep: bool = True
    ) -> torch.Tensor | None:
        """Add the sum of the gradients, clipped as the plan says, to ``summed_grad``, in place where there is one already.

        A sample whose gradient is not finite contributes exactly nothing.

        Args:
            max_grad_norm: the clip norm C, by which a sample moves the sum at most.
            keep: whether what has arrived is needed again before :meth:`finish`.

        Returns:
            Norms of the samples' gradients, shape ``[samples, groups]``, on the CPU; ``None`` if unknown.

        Raises:
            NotImplementedError: the engine does not clip (:attr:`clips`).
        """
        raise NotImplementedError(f"{type(self).__name__} leaves clipping to the optimizer")

    def paused(self) -> AbstractContextManager[None]:
        """While this is entered, a backward pass that asks for no parameter's gradient goes past the engine."""
        return nullcontext()

    @property
    def busy(self) -> bool:
        """Whether calls of the model that it has followed wait for their gradients, or for the step."""
        return False

    @abstractmethod
    def clear(self) -> None:
        """Forget the gradients that have arrived, as ``zero_grad`` does."""

    @abstractmethod
    def finish(self) -> None:
        """A step was made: forget everything about it."""

    @abstractmethod
    def detach(self) -> None:
        """Take everything off the model."""


class IdleHandle(Handle):
    """Nothing is on the model.

    Args:
        module: what the training step calls.
    """

    def __init__(self, module: nn.Module) -> None:
        self.model = module
        self.counts: Callable[[], tuple[int, ...]] = no_counts

    @override
    def clear(self) -> None:
        pass

    @override
    def finish(self) -> None:
        pass

    @override
    def detach(self) -> None:
        pass


class Engine(ABC):
    """One way to obtain per-sample gradients.

    Attributes:
        name: its name, a value of ``grad_sample_mode``.
        opacus_mode: the mode handed to Opacus.
        last_resort: chosen only where no other engine passes the audit: it is right nearly everywhere, and its time grows
            with the number of samples, so that a short probe makes it look better than it is.
        audited: whether it computes the clipped sum itself, so that it can be compared with the reference.
        owns_gradients: whether gradients never arrive at trained parameters themselves; what does went past the engine.
        materialises: whether per-sample gradients of the whole batch are kept until the step.
        needs_wrapper: whether it works through Opacus's wrapper only.
        takes_shards: whether it needs no more than one whole layer at a time, as models have that are spread over processes.
    """

    name: str
    opacus_mode: str
    last_resort: bool = False
    audited: bool = True
    owns_gradients: bool = True
    materialises: bool = True
    needs_wrapper: bool = False
    takes_shards: bool = False

    @property
    def remembered(self) -> bool:
        """Whether its place among the engines may be remembered for the next run: not where a script has changed it."""
        return True

    @property
    def attached_by_opacus(self) -> bool:
        """Whether Opacus prepares the layers of the model."""
        return self.opacus_mode != "no_op"

    @abstractmethod
    def supports(self, module: nn.Module, record: Any) -> Verdict:
        """Whether it is worth trying on a model.

        Args:
            record: what the probe showed.

        Returns:
            The verdict.
        """

    @abstractmethod
    def attach(self, module: nn.Module, plan: Plan, prepared: Any = None) -> Handle:
        """Put the engine to work.

        Args:
            plan: how it is to be trained.
            prepared: what Opacus made of the module, if it already did.

        Returns:
            The handle.
        """


def drop_sample_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Take off what engines and Opacus leave on parameters: per-sample gradients, clipped sums, counters of calls."""
    for p in parameters:
        for name in ("grad_sample", "summed_grad", "_forward_counter"):
            if hasattr(p, name):
                delattr(p, name)


def no_counts() -> tuple[int, ...]:
    """What an engine takes the rows of every sample from until a loader tells them.

    Returns:
        Nothing: every sample has as many as the probe showed.
    """
    return ()


def per_sample(scale: float | torch.Tensor, gradients: torch.Tensor) -> float | torch.Tensor:
    """A factor per sample in the form that multiplies per-sample gradients.

    Args:
        scale: one number, or shape ``[samples]``.
        gradients: shape ``[samples, *parameter]``.

    Returns:
        The number, or shape ``[samples, 1, ...]`` in the gradients' dtype.
    """
    if not isinstance(scale, torch.Tensor):
        return scale
    return scale.to(gradients).view(-1, *[1] * (gradients.dim() - 1))


def zeros(parameter: nn.Parameter, samples: int) -> torch.Tensor:
    """Per-sample gradients of a parameter that no sample reached.

    Returns:
        Zeros of shape ``[samples, *parameter]``.
    """
    return torch.zeros((samples, *parameter.shape), dtype=parameter.dtype, device=parameter.device)

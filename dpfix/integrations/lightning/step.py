"""The ``training_step`` of a LightningModule as one call of a module, without what it does beside the loss."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torchmetrics import Metric  # type: ignore
from typing_extensions import override

from dpfix.instrument.function_modes import unfollowed


class TrainingStep(nn.Module):
    """A LightningModule whose ``forward`` is its ``training_step``.

    Which parts of itself a ``training_step`` calls is its own business; an engine needs one call of one module. Values that it
    logs and metrics that it updates are no part of the loss: they are kept until the real call has returned, so that a step
    that is only looked at leaves no trace in them.

    Args:
        module: the LightningModule.

    Attributes:
        module: see above.
    """

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module
        self._own: Callable[..., Any] = module.training_step
        self._beside = Beside()

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self._beside.kept(self.module):
            return type(self.module).training_step(self.module, *args, **kwargs)

    def in_loop(self, model: nn.Module) -> Callable[..., Any]:
        """What stands in for ``training_step`` in the Trainer's loop.

        Args:
            model: this module, or the wrapper of several processes around it.

        Returns:
            A function of the batch and its number.
        """

        @functools.wraps(self._own)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            self._beside.begin()
            output = model(*args, **kwargs)
            self._beside.carry_out(self.module)
            return output

        return training_step


Logged = tuple[str, Any, tuple[Any, ...], dict[str, Any]]
"""Name, value and further arguments of a call of ``log``."""


class Beside:
    """What a ``training_step`` does beside computing a loss: logged values, and the states of metrics."""

    def __init__(self) -> None:
        self._real = False
        self._logged: list[
            list[Logged]
        ] = []  # by every forward pass of the real call: an engine may make one per sample
        self._states: dict[Metric, dict[str, Any]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Beside:
        return Beside()

    def begin(self) -> None:
        """A real call begins."""
        self._real, self._logged, self._states = True, [], {}

    @contextmanager
    def kept(self, module: Any) -> Iterator[None]:
        """Keep what is logged and updated, and leave the module without it.

        Args:
            module: the LightningModule.

        Yields:
            Nothing.
        """
        own = vars(module).get("log")
        before = {m: _state(m) for m in module.modules() if isinstance(m, Metric)}
        logged: list[Logged] = []
        vars(module)["log"] = lambda name, value, *args, **kwargs: logged.append((name, _kept(value), args, kwargs))
        for metric, state in self._states.items():
            _put(metric, state)
        try:
            yield
            if self._real:
                self._logged.append(logged)
                self._states = {m: _state(m) for m in before}
        finally:
            del vars(module)["log"]
            if own is not None:
                vars(module)["log"] = own
            for metric, state in before.items():
                _put(metric, state)

    def carry_out(self, module: Any) -> None:
        """Log and update in earnest what the real call has kept.

        Args:
            module: the LightningModule.
        """
        for metric, state in self._states.items():
            _put(metric, state)
        logged, self._real, self._logged, self._states = self._logged, False, [], {}
        for same in zip(*logged, strict=False):
            name, _, args, kwargs = same[-1]
            module.log(name, _mean([value for _, value, *_ in same]), *args, **kwargs)


def _state(metric: Metric) -> dict[str, Any]:
    return {name: _own(value) for name, value in vars(metric).items()}


def _put(metric: Metric, state: dict[str, Any]) -> None:
    vars(metric).clear()
    vars(metric).update(state)


def _own(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    return copy.copy(value) if isinstance(value, (list, dict)) else value


def _kept(value: Any) -> Any:
    """A value that can be read later; inside ``torch.vmap`` every sample has its own."""
    functorch: Any = torch._C._functorch  # type: ignore
    with unfollowed():
        value = value.detach() if isinstance(value, torch.Tensor) else value
        while isinstance(value, torch.Tensor) and functorch.is_functorch_wrapped_tensor(value):
            value = functorch.get_unwrapped(value)
        return value


def _mean(values: list[Any]) -> Any:
    """What the forward passes of one call have logged under a name."""
    if not all(isinstance(value, (torch.Tensor, float, int)) for value in values):
        return values[-1]  # a metric, whose state all of them have updated
    numbers = [torch.as_tensor(value) for value in values]
    several = len(numbers) > 1 or numbers[0].numel() > 1
    return torch.cat([n.float().flatten() for n in numbers]).mean() if several else values[0]

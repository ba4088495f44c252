"""The two ways to say it: a call with the Trainer, or a callback in its list."""

from __future__ import annotations

import sys
from typing import Any

from dpfix.errors import ArgumentError, MisuseError
from dpfix.integrations.huggingface.trainer import TrainerInPrivate
from dpfix.training.result import PrivateTraining

try:
    from transformers import Trainer, TrainerCallback
except ImportError as error:  # pragma: no cover
    raise ImportError("dpfix.integrations.huggingface needs transformers: pip install 'dpfix[huggingface]'") from error


def make_private(
    trainer: Trainer,
    *,
    noise_multiplier: float,
    max_grad_norm: float | list[float],
    delta: float | None = None,
    **options: Any,
) -> PrivateTraining:
    """Make a Trainer private; ``trainer.train()`` and everything else stays as it is.

    Args:
        trainer: a ``transformers.Trainer`` or one of a subclass, before ``train()``.
        noise_multiplier: see :func:`dpfix.make_private_safe`.
        max_grad_norm: see :func:`dpfix.make_private_safe`. ``TrainingArguments.max_grad_norm`` has no effect.
        delta: if given, epsilon at this delta is logged with the losses.
        **options: further arguments of :func:`dpfix.make_private_safe`.

    Returns:
        What :func:`dpfix.make_private_safe` returns.

    Raises:
        ArgumentError: the Trainer was made with something that private training cannot do. Other refusals are those of
            :func:`dpfix.make_private_safe`.
    """
    if not isinstance(trainer, Trainer):
        raise ArgumentError(
            f"trainer is a {type(trainer).__name__}, not a transformers.Trainer.",
            help="Pass the Trainer, or use dpfix.make_private_safe with your own loop.",
            path="trainer",
        )
    given = {"noise_multiplier": noise_multiplier, "max_grad_norm": max_grad_norm, **options}
    at_work = TrainerInPrivate(trainer, given, delta)
    private = at_work.make()
    at_work.put_in()
    trainer.add_callback(_Begins(at_work))
    return private


class _Begins(TrainerCallback):
    """Looks at what a training begins with."""

    def __init__(self, at_work: TrainerInPrivate) -> None:
        self._at_work = at_work

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Nothing but the private optimizer and loader may be used."""
        self._at_work.begin(kwargs.get("optimizer"), kwargs.get("train_dataloader"), state.global_step)


class PrivateCallback(TrainerCallback):
    """As :func:`make_private`, as a callback: ``Trainer(..., callbacks=[PrivateCallback(...)])``.

    Model, optimizer and loader are made private when ``train()`` begins.

    Args:
        noise_multiplier: see :func:`dpfix.make_private_safe`.
        max_grad_norm: see :func:`dpfix.make_private_safe`.
        delta: if given, epsilon at this delta is logged with the losses.
        **options: further arguments of :func:`dpfix.make_private_safe`.
    """

    def __init__(
        self,
        *,
        noise_multiplier: float,
        max_grad_norm: float | list[float],
        delta: float | None = None,
        **options: Any,
    ) -> None:
        self._given = {"noise_multiplier": noise_multiplier, "max_grad_norm": max_grad_norm, **options}
        self._delta = delta
        self._at_work: TrainerInPrivate | None = None

    @property
    def private(self) -> PrivateTraining:
        """What :func:`dpfix.make_private_safe` returned.

        Raises:
            MisuseError: no training has begun.
        """
        found = None if self._at_work is None else self._at_work.private
        if found is None:
            raise MisuseError(
                "PrivateCallback.private: no training has begun.", help="Call trainer.train() first.", path="private"
            )
        return found

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The Trainer that is being made is the one to make private."""
        self._at_work = TrainerInPrivate(_that_is_made(), self._given, self._delta)
        self._at_work.put_in()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Nothing but the private optimizer and loader may be used.

        Raises:
            MisuseError: the callback came too late to a Trainer.
        """
        if self._at_work is None:
            raise MisuseError(
                "PrivateCallback was added to a Trainer that was made already: what it trains would not be private.",
                help="Pass callbacks=[PrivateCallback(...)] to Trainer, or use make_private(trainer, ...).",
                path="callbacks",
            )
        self._at_work.begin(kwargs.get("optimizer"), kwargs.get("train_dataloader"), state.global_step)


def _that_is_made() -> Trainer:
    """The Trainer whose ``__init__`` is running: a callback is told of everything but that."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, Trainer):
            return found
        frame = frame.f_back
    raise MisuseError(
        "PrivateCallback.on_init_end was called by something else than a Trainer.",
        help="Pass callbacks=[PrivateCallback(...)] to Trainer, or use make_private(trainer, ...).",
        path="callbacks",
    )

"""MONAI and ignite: a handler that puts epsilon among the metrics of an engine. Needs ``pip install dpfix[monai]``."""

from __future__ import annotations

import functools
from typing import Any

from ignite.engine import Engine, Events

from dpfix.errors import MisuseError
from dpfix.instrument import pytree
from dpfix.sampling.inner_loader import inner_loader
from dpfix.sampling.rate import index_set
from dpfix.scan.arguments import check_delta
from dpfix.training.lasting import Lasting


class PrivacyHandler:
    """Puts epsilon into ``engine.state.metrics``, where handlers for TensorBoard, MLflow or the console find it.

    ``PrivacyHandler(private, delta=1e-5).attach(trainer)``, or among the ``train_handlers`` of a MONAI trainer. Epsilon is
    computed with the last iteration of every epoch, before the handlers of a completed epoch run. A ``GanTrainer`` then
    makes as many fakes as the batch has samples, not as many as the loader's batch size: draws differ in size.

    Args:
        private: what :func:`dpfix.make_private_safe` returned.
        delta: of epsilon; one tenth of 1 / number of samples if not given.
        target_epsilon: the engine is told to terminate before the step that would go beyond it.
        name: of the metric.
    """

    def __init__(
        self, private: Any, delta: float | None = None, target_epsilon: float | None = None, name: str = "epsilon"
    ) -> None:
        self.private, self.name = private, name
        self.delta = 0.1 / len(index_set(inner_loader(private[-1]))) if delta is None else check_delta(delta)
        self._lasting = None if target_epsilon is None else Lasting(private, target_epsilon, self.delta)

    def attach(self, engine: Engine) -> None:
        """Watch an engine.

        Args:
            engine: the trainer.

        Raises:
            MisuseError: it scales the loss.
        """
        scaler: Any = getattr(engine, "scaler", None)
        if scaler is not None and scaler.is_enabled():
            raise MisuseError(
                f"amp=True in {type(engine).__name__}: its GradScaler scales the loss.",
                "A scale that follows the data, and steps that are left out on overflow, are not private.",
                "Pass amp_kwargs={'dtype': torch.bfloat16} and set trainer.scaler = torch.amp.GradScaler(enabled=False).",
                path="engine",
            )
        if hasattr(engine, "g_prepare_batch"):
            _fakes_for_the_batch(engine)
        engine.add_event_handler(Events.STARTED, self._check)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._iteration)
        for event in (Events.EPOCH_COMPLETED, Events.COMPLETED):
            engine.add_event_handler(event, self._write)

    def _check(self, engine: Engine) -> None:
        if self._lasting is not None:
            self._lasting.check()

    def _iteration(self, engine: Engine) -> None:
        spent = self._lasting is not None and self._lasting.steps == 0
        if spent or (engine.state.epoch_length and engine.state.iteration % engine.state.epoch_length == 0):
            self._write(engine)
        if spent:
            engine.terminate()

    def _write(self, engine: Engine) -> None:
        engine.state.metrics[self.name] = self.private.get_epsilon(self.delta)


def _fakes_for_the_batch(engine: Any) -> None:
    """Let a ``GanTrainer`` ask for as many latents as the batch at hand has samples."""
    prepare = engine.g_prepare_batch

    @functools.wraps(prepare)
    def prepare_batch(num_latents: int, *args: Any, **kwargs: Any) -> Any:
        rows = next((len(t) for t in pytree.tensors(engine.state.batch) if t.dim()), num_latents)
        return prepare(rows, *args, **kwargs)

    engine.g_prepare_batch = prepare_batch

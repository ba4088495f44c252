"""A Trainer whose model, optimizer and loader are private."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dpfix.api import make_private_safe
from dpfix.errors import DPFixError, LossError, MisuseError, RankError, TrainingStepError
from dpfix.integrations.huggingface.asked import check_trainer, on_ranks
from dpfix.integrations.huggingface.losses import MeansInside, SampleBySample, loss_of
from dpfix.report.finding import Finding, Fixability, Severity
from dpfix.sampling.ranks import Ranks
from dpfix.sampling.unit_names import column
from dpfix.scan.arguments import check_whole_batches
from dpfix.training.result import PrivateTraining

Way = MeansInside | SampleBySample


class TrainerInPrivate:
    """What stands in for the loader, the loss and the log of one Trainer.

    Args:
        trainer: the Trainer.
        arguments: of :func:`dpfix.make_private_safe`.
        delta: at which epsilon is logged.

    Attributes:
        private: what :func:`dpfix.make_private_safe` returned; ``None`` before.
    """

    def __init__(self, trainer: Any, arguments: Mapping[str, Any], delta: float | None) -> None:
        check_trainer(trainer)
        check_whole_batches(arguments, "a Trainer")
        self.private: PrivateTraining | None = None
        self._trainer, self._arguments, self._delta = trainer, dict(arguments), delta
        self._model: nn.Module | None = None
        self._way: Way = MeansInside()
        self._take_off: Callable[[], None] = lambda: None
        self._loader, self._loss, self._log = trainer.get_train_dataloader, trainer.compute_loss, trainer.log
        self._given_loss = self._loss

    def put_in(self) -> None:
        """From now on the Trainer gets the private loader; what it lacks of the rest is made when it asks for that."""
        trainer = self._trainer
        trainer.get_train_dataloader, trainer.compute_loss, trainer.log = self.loader, self.loss, self.log
        # what has gradients after backward() is not what is released: neither its norm nor clipping it means anything
        trainer._clip_grad_norm = trainer._get_grad_norm = lambda *args, **kwargs: None

    def loader(self) -> Any:
        """The private loader of the model that the Trainer has now."""
        if self.private is None or self._trainer.model is not self._model:  # model_init makes another one
            self.make()
        assert self.private is not None
        return self.private[2]

    def loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """The Trainer's ``compute_loss``; in training, the mean over the samples of what each has alone."""
        if self.private is None or not (model.training and torch.is_grad_enabled()):
            return self._loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        return self._way(self._loss, model, inputs, **({"return_outputs": True} if return_outputs else {}))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> Any:
        """The Trainer's ``log``, with epsilon."""
        if self._delta is not None and self.private is not None:
            logs = {**logs, "epsilon": self.private.get_epsilon(self._delta)}
        return self._log(logs, *args, **kwargs)

    def begin(self, optimizer: Any, loader: Any, steps: int) -> None:
        """A training begins.

        Args:
            optimizer: what it is going to step with.
            loader: what it is going to iterate over.
            steps: how many were made before a checkpoint; the batches of those in this pass are passed over.

        Raises:
            MisuseError: it is not the private one.
        """
        private = self.private
        if private is None or loader is not private[2] or getattr(optimizer, "optimizer", optimizer) is not private[1]:
            raise MisuseError(
                "Trainer.train() begins with another optimizer or loader than those that dpfix made private:",
                "what it trains would not be private. No parameter has moved.",
                "Leave create_optimizer and get_train_dataloader alone after make_private(trainer), and pass optimizers= to "
                "Trainer if it is to train with another optimizer.",
                path="trainer",
            )
        loader.ledger.passes_over = 0 if self._trainer.args.ignore_data_skip else steps % len(loader)

    # ------------------------------------------------------------------ once

    def make(self) -> PrivateTraining:
        """Make model, optimizer and loader private; if that is refused, the Trainer is as it was."""
        trainer = self._trainer
        optimizer, training, loader = trainer.optimizer, trainer.model.training, self._loader()
        again, put_back = self.private is not None, _nothing
        try:
            if again:
                self._take_off()
                trainer.optimizer = None
            trainer.create_optimizer()
            trainer.model.train()
            self._loss, put_back = loss_of(trainer, self._given_loss)
            model = on_ranks(trainer)
            own = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
            private, way = self._first_right_way(model, own, loader)
        except BaseException:
            put_back()
            trainer.optimizer = optimizer
            trainer.model.train(training)
            raise
        self._way, self._model, trainer.optimizer = way, trainer.model, private[1]
        if model is not trainer.model:  # the Trainer leaves what is wrapped as it is
            trainer.model_wrapped = trainer.accelerator.prepare_model(
                model, device_placement=False, evaluation_mode=True
            )
        self.private = _with(private, _finding(trainer, way)) if way.changed else private
        return self.private

    def _names(self) -> dict[str, Any]:
        """Names under a column of the training data: a Trainer takes columns that the model does not know out of its loader."""
        unit = self._arguments.get("privacy_unit")
        names = column(self._trainer.train_dataset, unit) if isinstance(unit, str) else None
        return {} if names is None else {"privacy_unit": names}

    def _first_right_way(self, model: nn.Module, optimizer: Any, loader: Any) -> tuple[PrivateTraining, Way]:
        """The first way in which the loss is one that can be clipped, the same on all ranks."""
        ranks, refused = Ranks.of(model), list[DPFixError]()
        for way in (MeansInside(), SampleBySample()):
            with ranks.all_or_none():
                made = self._in_this_way(way, model, optimizer, loader)
                again = isinstance(made, (LossError, TrainingStepError))
                other_way = any(ranks.exchange(again))  # the others only know that a rank has failed
            if isinstance(made, PrivateTraining):
                return made, way
            refused.append(made)
            if not other_way:
                raise made
        raise refused[0]

    def _in_this_way(
        self, way: Way, model: nn.Module, optimizer: Any, loader: Any
    ) -> PrivateTraining | LossError | TrainingStepError | RankError:
        take_off = way.put_on(self._trainer.model)
        try:
            private = make_private_safe(
                module=model,
                optimizer=optimizer,
                data_loader=loader,
                training_step=_Step(self._trainer, self._loss, way),
                wrap_model=False,
                **(self._arguments | self._names()),
            )
        except (LossError, TrainingStepError, RankError) as error:
            take_off()
            return error
        except BaseException:
            take_off()
            raise
        self._take_off = take_off
        return private


def _nothing() -> None:
    pass


class _Step:
    """From a batch of the loader to the loss of a Trainer, which stays as it is."""

    def __init__(self, trainer: Any, compute: Any, way: Way) -> None:
        self._trainer, self._compute, self._way = trainer, compute, way

    def __call__(self, model: nn.Module, batch: Any) -> torch.Tensor:
        trainer = self._trainer
        with _numbers_unchanged(trainer), trainer.accelerator.autocast(), trainer.compute_loss_context_manager():
            return self._way(self._compute, model, trainer._prepare_inputs(batch))


@contextmanager
def _numbers_unchanged(trainer: Any) -> Iterator[None]:
    """Inside, what a Trainer counts and collects for its log is thrown away."""
    before = {name: copy.deepcopy(value) for name, value in vars(trainer).items() if _is_plain(value)}
    try:
        yield
    finally:
        vars(trainer).update(before)


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_is_plain(part) for part in value.values())
    if isinstance(value, (list, tuple, set)):
        return all(_is_plain(part) for part in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _with(private: PrivateTraining, finding: Finding) -> PrivateTraining:
    report = replace(private.report, findings=(*private.report.findings, finding))
    return private.with_report(report)


def _finding(trainer: Any, way: Way) -> Finding:
    return Finding(
        "DPF044",
        Severity.BREAKS_GUARANTEE,
        Fixability.CHANGES_MODEL,
        f"{type(trainer).__name__} divides the loss of a batch by the number of its tokens (computed {way.place}).",
        "one sample's share of the loss depends on how long the others are, so clipping per sample bounds nothing.",
        "the loss is the mean over the samples of the mean over each sample's own tokens; evaluation stays as it is",
        "report losses of this training as means per sample; they differ from those of a mean over all tokens.",
        "trainer",
    )

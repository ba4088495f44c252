"""What makes a trainer of nnU-Net private: a class to derive from together with it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from opacus.accountants import create_accountant
from torch.utils.data import DataLoader

import dpfix
from dpfix.errors import ArgumentError
from dpfix.integrations.nnunet import checkpoints, plot
from dpfix.integrations.nnunet.patients import PatientPatches, mean_over_patients, stock_loader
from dpfix.integrations.nnunet.settings import Settings, read_settings
from dpfix.report.statement import PrivacyStatement
from dpfix.sampling.rate import sample_rate
from dpfix.training.noise_search import Target, noise_for
from dpfix.weights.files import written_whole

KEY = "dpfix"
"""Under this key a checkpoint has the accountant and what was logged, beside nnU-Net's own keys."""

NOT_COVERED = (
    "the fingerprint and the plans (spacings, sizes, patch and batch size), planned on the training cases",
    "the intensity statistics in the plans, taken from the training cases",
    "cases of the validation fold (with fold 'all' the training cases): pseudo Dice, validation loss, and checkpoint_best, "
    "which is selected on them",
    "the training loss in the log and in progress.png: computed on training patients, without noise",
    "the preprocessed cases and the summary of the final validation in the output folder",
    "hyper-parameters and stopping time that were chosen by looking at the same data",
    "what pretrained weights already hold of their own training data",
)
"""What the guarantee of a training with nnU-Net does not speak about."""


class PrivateTrainer:
    """Derive from this and then from a trainer of nnU-Net; ``-tr`` takes the result.

    Patients are drawn by Poisson sampling; of each, some patches are cut and augmented as nnU-Net does it, their gradients
    are averaged, and the average is clipped. What nnU-Net's loss does over a batch it does over one patient.

    Attributes:
        private: the private training, while there is one.
        settings: the privacy settings.
    """

    private: dpfix.PrivateTraining | None = None
    settings: Settings
    _accounted: dict[str, Any] | None = None
    _epsilons: list[float]
    _delta: float

    # nnU-Net's attributes, for the type checker
    network: Any
    optimizer: Any
    loss: Any
    device: Any
    dataloader_train: Any
    plans_manager: Any
    configuration_manager: Any

    # ------------------------------------------------------------------ before the training

    def initialize(self) -> None:
        """Read the settings, refuse what cannot be private, then initialise as nnU-Net does.

        Raises:
            ArgumentError: the training is distributed, or one stage of a cascade.
        """
        this: Any = self
        if this.is_ddp:
            raise ArgumentError(
                "nnU-Net: -num_gpus above 1 (DistributedDataParallel) is not supported by the private trainer: every process "
                "would draw its own patients.",
                help="Train on one GPU.",
                path="num_gpus",
            )
        if this.is_cascaded:
            raise ArgumentError(
                f"nnU-Net: configuration {this.configuration_name!r} is the second stage of a cascade.",
                "Its input holds predictions of the first stage about the training patients, which has its own budget.",
                "Train 3d_fullres or 3d_lowres.",
                path="configuration",
            )
        configuration = self.configuration_manager.configuration
        self.settings = read_settings(os.environ, self.plans_manager.plans, configuration)
        this.num_epochs = self.settings.epochs or this.num_epochs
        this.num_iterations_per_epoch = self.settings.iterations or this.num_iterations_per_epoch
        super().initialize()  # type: ignore[misc]
        this.grad_scaler = None  # its loss scale would multiply gradients before they are clipped

    def _do_i_compile(self) -> bool:
        return False  # per-sample gradients are not taken from compiled networks

    def get_dataloaders(self) -> tuple[Any, Any]:
        """nnU-Net's loaders, with patients instead of patches for training.

        Returns:
            The loader of patients, and nnU-Net's own for validation.
        """
        augmenter, validation = super().get_dataloaders()  # type: ignore[misc]
        data = PatientPatches(stock_loader(augmenter), self.settings.patches, self.settings.patient_of)
        wanted = self.settings.patients or self.configuration_manager.batch_size
        workers = min(_workers(), wanted)
        loader = DataLoader(
            data, min(wanted, len(data)), shuffle=True, num_workers=workers, persistent_workers=workers > 0
        )
        return loader, validation

    def on_train_start(self) -> None:
        """Start as nnU-Net does, then make network, optimizer and loader private."""
        self.settings_checked()
        super().on_train_start()  # type: ignore[misc]
        loader = self.dataloader_train
        self._delta = self.settings.delta or 0.1 / len(loader.dataset)
        engine = dpfix.SafePrivacyEngine(accountant=self.settings.accountant)
        self._epsilons = []
        if self._accounted is not None:
            engine.accountant.load_state_dict(self._accounted["accountant"])
            self._epsilons = list(self._accounted["epsilons"])
        noise = self._noise_multiplier(loader)
        self.private = dpfix.make_private_safe(
            module=self.network,
            optimizer=self.optimizer,
            data_loader=loader,
            training_step=self._loss_of,
            noise_multiplier=noise,
            max_grad_norm=self.settings.max_grad_norm,
            privacy_engine=engine,
            wrap_model=False,
            budget=self.settings.shared_budget(),
        )
        self._refuse_beyond_budget(noise, sample_rate(loader))
        _, self.optimizer, private_loader = self.private
        self.dataloader_train = _forever(private_loader)
        self._say(f"dpfix: private training.\n{self.private.report.details()}\n{self._warning()}")

    def _refuse_beyond_budget(self, noise: float, rate: float) -> None:
        """A fold that would be stopped in the middle is not begun."""
        this: Any = self
        assert self.private is not None
        spender = self.private[1].guard.guarded.accounting.spender
        steps = (this.num_epochs - this.current_epoch) * this.num_iterations_per_epoch
        if spender is None:
            return
        try:
            spender.check((noise, rate), steps, f"the {steps} steps of this fold that are to come")
        except dpfix.BudgetError:
            self.private[0].cleanup()
            self.private = None
            raise

    def settings_checked(self) -> None:
        """Initialise if that was not done yet, and check the budget before anything else starts."""
        this: Any = self
        if not this.was_initialized:
            this.initialize()
        self.settings.check_budget()

    def _noise_multiplier(self, loader: DataLoader[Any]) -> float:
        this: Any = self
        if self.settings.noise_multiplier is not None:
            return self.settings.noise_multiplier
        steps = this.num_epochs * this.num_iterations_per_epoch
        budget = Target(self.settings.target_epsilon or 0.0, self._delta, sample_rate(loader), steps)
        return noise_for(budget, create_accountant(self.settings.accountant))

    # ------------------------------------------------------------------ training

    def _loss_of(self, network: Any, batch: dict[str, Any]) -> torch.Tensor:
        """From patients to the loss."""
        data = batch["data"].to(self.device, non_blocking=True)
        target = batch["target"]
        move = [t.to(self.device, non_blocking=True) for t in (target if isinstance(target, list) else [target])]
        output = network(data.flatten(0, 1))
        return mean_over_patients(self.loss, output, move if isinstance(target, list) else move[0])

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """One private step: no scaler, no clipping of the summed gradient, no autocast.

        Args:
            batch: drawn patients, or the placeholder for an empty draw.

        Returns:
            The loss, for the log.
        """
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss_of(self.network, batch)
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.detach().cpu().numpy()}

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        """Log the privacy loss beside the training loss."""
        super().on_train_epoch_end(train_outputs)  # type: ignore[misc]
        statement = self.statement()
        self._epsilons.append(statement.epsilon)
        self._say(f"epsilon {statement.epsilon:.4g} at delta {statement.delta:.3g} after {statement.steps} steps")

    def on_epoch_end(self) -> None:
        """Plot the privacy loss below nnU-Net's progress."""
        super().on_epoch_end()  # type: ignore[misc]
        this: Any = self
        plot.append_epsilon(Path(this.output_folder) / "progress.png", self._epsilons)

    def on_train_end(self) -> None:
        """End as nnU-Net does; the network is afterwards an ordinary one."""
        super().on_train_end()  # type: ignore[misc]
        self._say(str(self.statement()))
        self.dataloader_train.close()
        assert self.private is not None
        self.private[0].cleanup()

    def statement(self) -> PrivacyStatement:
        """The privacy statement for the steps made so far.

        Returns:
            The statement; its unit is the patient.

        Raises:
            ArgumentError: no private training has begun.
        """
        if self.private is None:
            raise ArgumentError("nnU-Net: no private training has begun, so there is nothing to state.", path="private")
        unit = f"one patient: {self.settings.patches} patch(es) per step, averaged before clipping"
        if self.settings.patient_pattern is None:
            unit += " (every case counts as a patient of its own; see patient_pattern)"
        return replace(self.private.statement(self._delta), unit=unit, not_covered=NOT_COVERED)

    # ------------------------------------------------------------------ checkpoints

    def save_checkpoint(self, filename: str) -> None:
        """Save nnU-Net's checkpoint with the accountant in it, and the privacy statement beside it.

        The trainer's name in it is nnU-Net's own, so that a stock predictor loads it without dpfix.
        """
        this: Any = self
        if this.disable_checkpointing or self.private is None:
            super().save_checkpoint(filename)  # type: ignore[misc]
            return
        stock = f"{filename}.part"
        try:
            super().save_checkpoint(stock)  # type: ignore[misc]
            checkpoint = checkpoints.read(stock)
        finally:
            Path(stock).unlink(missing_ok=True)
        checkpoint["trainer_name"] = "nnUNetTrainer"
        accountant: Any = self.private.privacy_engine.accountant
        checkpoint[KEY] = {
            "accountant": accountant.state_dict(),
            "epsilons": self._epsilons,
            "version": dpfix.__version__,
        }
        with written_whole(filename) as file:
            torch.save(checkpoint, file)
        Path(filename).with_name("privacy_statement.json").write_text(self.statement().to_json())

    def load_checkpoint(self, filename_or_checkpoint: Any) -> None:
        """Load a checkpoint; a training that is continued goes on counting where it was.

        Raises:
            ArgumentError: the checkpoint was not made by private training.
        """
        checkpoint = filename_or_checkpoint
        if isinstance(checkpoint, str):  # nnU-Net would run what is in it; nothing is, if this reads it
            checkpoint = checkpoints.read(checkpoint)
        if KEY not in checkpoint:
            raise ArgumentError(
                "nnU-Net: the checkpoint was not made by private training: it has no accountant, so its steps cannot be "
                "counted.",
                help="Start anew; -pretrained_weights takes weights that were trained on other, public data.",
                path="checkpoint",
            )
        super().load_checkpoint(filename_or_checkpoint)  # type: ignore[misc]
        self._accounted = checkpoint[KEY]

    # ------------------------------------------------------------------ words

    def _say(self, text: str) -> None:
        this: Any = self
        this.print_to_log_file(text)

    def _warning(self) -> str:
        return "dpfix: the guarantee is about the weights. Not covered:\n" + "\n".join(f"  - {n}" for n in NOT_COVERED)


def _forever(loader: DataLoader[Any]) -> Iterator[Any]:
    """nnU-Net asks for one batch after another; every draw is independent of the others."""
    while True:
        yield from loader


def _workers() -> int:
    """Number of worker processes, as nnU-Net is told it."""
    text = dict(os.environ).get("nnUNet_n_proc_DA", "")
    return int(text) if text.isdigit() else min(4, os.cpu_count() or 1)

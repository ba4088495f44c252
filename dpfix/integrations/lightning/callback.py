"""The callback that makes a Lightning training private."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from dpfix.api import make_private_safe
from dpfix.errors import ArgumentError, LoaderError, OptimizerError
from dpfix.instrument.source import warn_user
from dpfix.integrations.lightning.several import as_called, check_sampler, check_strategy, end
from dpfix.integrations.lightning.step import TrainingStep
from dpfix.report.statement import PrivacyStatement
from dpfix.sampling.rate import index_set
from dpfix.scan.arguments import check_delta, check_whole_batches
from dpfix.training.lasting import Lasting, check_target
from dpfix.training.loader_owner import replace_loader
from dpfix.training.result import PrivateTraining

if TYPE_CHECKING:
    from lightning.pytorch import Callback  # type: ignore
else:
    try:
        from lightning.pytorch import Callback
    except ImportError:  # the package under its older name
        from pytorch_lightning import Callback

FILLED_IN = ("optimizer", "data_loader", "wrap_model")
"""Arguments of the call that are the Trainer's."""


class PrivateCallback(Callback):
    """Makes a training by a plain ``Trainer`` private: ``Trainer(callbacks=[PrivateCallback(...)])``.

    Before the first batch, the model that ``fit`` got, the optimizer of its ``configure_optimizers`` and the Trainer's loader go
    through :func:`dpfix.make_private_safe`. ``training_step`` is called as it is and audited as a whole. Epsilon is logged as
    ``epsilon`` at the end of every epoch, where other callbacks and loggers find it. Checkpoints have the keys of the model,
    and hold what was released: a training that goes on with ``ckpt_path`` states the epsilon of all its runs.

    Args:
        noise_multiplier: see :func:`dpfix.make_private_safe`.
        max_grad_norm: see :func:`dpfix.make_private_safe`.
        delta: of the logged epsilon; one tenth of 1 / number of samples if not given.
        target_epsilon: the training stops before the step that would go beyond it.
        module: path of the part to train privately, for example ``"discriminator"``: with several optimizers, or with
            ``automatic_optimization = False``, the part whose loss sees the data. It has to be called as a whole.
        **arguments: others of :func:`dpfix.make_private_safe`.

    Attributes:
        private: what :func:`dpfix.make_private_safe` returned, from the beginning of ``fit`` on.
    """

    private: PrivateTraining

    def __init__(
        self,
        *,
        noise_multiplier: float,
        max_grad_norm: float | list[float],
        delta: float | None = None,
        target_epsilon: float | None = None,
        module: str | None = None,
        **arguments: Any,
    ) -> None:
        check_whole_batches(arguments, "a Trainer")
        if filled := [name for name in FILLED_IN if name in arguments]:
            raise ArgumentError(
                f"{filled[0]} is an argument of PrivateCallback.",
                "It is the Trainer's own.",
                "Leave it out.",
                path=filled[0],
            )
        self._delta = None if delta is None else check_delta(delta)
        self._target = None if target_epsilon is None else check_target(target_epsilon)
        self._path = module
        self._arguments = {"noise_multiplier": noise_multiplier, "max_grad_norm": max_grad_norm, **arguments}
        self._loaded: tuple[Any, bool] | None = None
        self._lasting: Lasting | None = None
        self._begun = False

    @property
    def delta(self) -> float:
        """Of the logged epsilon."""
        return self._delta if self._delta is not None else 0.1 / len(index_set(self.private[-1]))

    def statement(self) -> PrivacyStatement:
        """The privacy statement for the steps made so far."""
        return self.private.statement(self.delta)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """The weights of a checkpoint are loaded when the model is repaired."""
        if stage != "fit":
            return
        check_strategy(trainer, self._path)
        _check_trainer(trainer, self._target)

        def load_later(state: Mapping[str, Any], strict: bool = True, **kwargs: Any) -> Any:
            """A repaired model has other keys than the one that ``fit`` got; the state is loaded when it is repaired."""
            fits = state.keys() == pl_module.state_dict().keys()
            if not fits:
                self._loaded = state, strict
            return type(pl_module).load_state_dict(pl_module, state if fits else {}, strict=fits and strict, **kwargs)

        vars(pl_module)["load_state_dict"] = load_later

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the training private."""
        vars(pl_module).pop("load_state_dict", None)
        trainer.fit_loop.setup_data()
        loader = _only_loader(trainer)
        root, told = self._root(trainer, pl_module)
        position, optimizer = _its_optimizer(trainer.strategy.optimizers, root, self._path)
        with as_called(trainer, root) as model:
            self.private = make_private_safe(
                module=model, optimizer=optimizer, data_loader=loader, wrap_model=False, **{**told, **self._arguments}
            )
            self._begun = True
        optimizers = list(trainer.strategy.optimizers)
        optimizers[position] = self.private[1]
        trainer.strategy.optimizers = optimizers
        replace_loader(pl_module, loader, self.private[-1])
        if isinstance(root, TrainingStep):
            vars(pl_module)["training_step"] = root.in_loop(model)
        if self._loaded is not None:
            (state, strict), self._loaded = self._loaded, None
            pl_module.load_state_dict(state, strict=strict)

    def _root(self, trainer: Any, pl_module: Any) -> tuple[nn.Module, dict[str, Any]]:
        """The module that is trained privately, and what is known about its calls."""
        if self._path is not None:
            return pl_module.get_submodule(self._path), {}
        if not pl_module.automatic_optimization:
            return pl_module, {}

        def training_step(step: Any, batch: Any) -> Any:
            batch = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch), dataloader_idx=0)
            with trainer.precision_plugin.train_step_context():
                output = step(batch, 0) if takes_index else step(batch)
            return output["loss"] if isinstance(output, Mapping) else output

        takes_index = len(inspect.signature(pl_module.training_step).parameters) > 1
        return TrainingStep(pl_module).train(pl_module.training), {"training_step": training_step}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """A budget has to last for a step."""
        if self._target is not None:
            self._lasting = Lasting(self.private, self._target, self.delta)
            self._lasting.check()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop where the next step would go beyond the target."""
        if self._lasting is not None and self._lasting.steps == 0:
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log epsilon."""
        pl_module.log("epsilon", self.private.get_epsilon(self.delta), prog_bar=True, sync_dist=True)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """The model is the plain one again."""
        self._end(trainer, pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """The model is the plain one again."""
        self._end(trainer, pl_module)

    def _end(self, trainer: Any, pl_module: Any) -> None:
        """The model is the plain one again; what was released stays known."""
        end(trainer)
        for name in ("load_state_dict", "training_step"):
            vars(pl_module).pop(name, None)
        if self._begun:
            self._begun = False
            self.private[0].cleanup()


def _check_trainer(trainer: Any, target: float | None) -> None:
    """What a Trainer must not do around private steps.

    Raises:
        ArgumentError: it is set up to do so.
    """
    for wrong, fact, why, help in (
        (
            trainer.accumulate_grad_batches != 1,
            f"accumulate_grad_batches={trainer.accumulate_grad_batches} in the Trainer.",
            "the gradients of several draws would be added up and released as one.",
            "Leave it at 1 and raise the batch_size of the loader; opacus.utils.batch_memory_manager splits large batches.",
        ),
        (
            getattr(trainer.precision_plugin, "scaler", None) is not None,
            f"precision={trainer.precision!r} in the Trainer, which scales the loss.",
            "a scale that follows the data, and steps that are left out on overflow, are not private.",
            "Use precision='bf16-mixed'.",
        ),
        (
            bool(trainer.reload_dataloaders_every_n_epochs),
            f"reload_dataloaders_every_n_epochs={trainer.reload_dataloaders_every_n_epochs} in the Trainer.",
            "it would replace the private loader by one that draws as the script's does.",
            "Leave it at 0.",
        ),
        (
            target is not None and bool(trainer.min_steps or (trainer.min_epochs or 0) > 1),
            "target_epsilon together with min_steps or min_epochs in the Trainer.",
            "the Trainer would not stop when the budget is spent.",
            "Leave them out.",
        ),
    ):
        if wrong:
            raise ArgumentError(fact, why, help, path="trainer")
    if trainer.gradient_clip_val:
        warn_user(
            f"gradient_clip_val={trainer.gradient_clip_val} in the Trainer has no effect in a private training, which clips the "
            "gradient of every sample to max_grad_norm. It is switched off."
        )
        trainer.gradient_clip_val = None


def _only_loader(trainer: Any) -> Any:
    loaders = trainer.fit_loop._combined_loader.flattened
    if len(loaders) != 1:
        raise LoaderError(
            f"the Trainer draws every batch from {len(loaders)} training loaders.",
            "a step has to be one Poisson draw from one set of samples.",
            "Pass one loader, over a ConcatDataset or a StackDataset.",
            path="data_loader",
        )
    check_sampler(loaders[0])
    return loaders[0]


def _its_optimizer(optimizers: list[Any], root: nn.Module, path: str | None) -> tuple[int, Any]:
    """The optimizer of a module, and its place among the Trainer's."""
    own = {id(p) for p in root.parameters()}
    found = [
        (place, optimizer)
        for place, optimizer in enumerate(optimizers)
        if any(id(p) in own for group in optimizer.param_groups for p in group["params"])
    ]
    if len(found) != 1:
        raise OptimizerError(
            f"configure_optimizers: {len(found)} of its {len(optimizers)} optimizers train "
            + (f"`{path}`." if path else "the model."),
            "one of them makes the private steps.",
            "Pass module=, the path of the part whose loss sees the data and which one optimizer trains; what learns from its "
            "outputs alone needs no noise.",
            path="optimizer",
        )
    return found[0]

"""What a Trainer's strategy for several processes has made of a LightningModule, as one call of the library takes it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dpfix.errors import ArgumentError, LoaderError, ModelError
from dpfix.integrations.lightning.step import TrainingStep
from dpfix.report.finding import Finding

DDP, SPREAD = "DDPStrategy", "ModelParallelStrategy"


def check_strategy(trainer: Any, path: str | None) -> None:
    """Refuse strategies that train on several processes in a way that nothing here knows.

    Args:
        trainer: the Trainer.
        path: of the part that is trained privately.

    Raises:
        ArgumentError: with the way out.
    """
    strategy = trainer.strategy
    kinds = {cls.__name__ for cls in type(strategy).__mro__}
    known = kinds & {DDP, SPREAD}
    where = f"strategy: {type(strategy).__name__}"
    if "FSDPStrategy" in kinds:
        raise ArgumentError(
            f"{where} wraps the model with FSDP1.",
            "it flattens the parameters of several layers into one, and no layer's gradient per sample is left.",
            "Use strategy=ModelParallelStrategy(data_parallel_size=..., tensor_parallel_size=1) and call "
            "torch.distributed.fsdp.fully_shard in configure_model, or strategy='ddp'.",
            path="trainer",
        )
    if trainer.world_size > 1 and not known:
        raise ArgumentError(
            f"{where} trains with {trainer.world_size} processes.",
            "what it does with gradients before they are clipped is not known.",
            "Use strategy='ddp', strategy=ModelParallelStrategy(...), or devices=1.",
            path="trainer",
        )
    if known and path is not None:
        raise ArgumentError(
            f"module={path!r} together with {where}:",
            "the strategy exchanges the gradients of the whole LightningModule, also those of the part that is not private.",
            "Use devices=1 and the default strategy, or a loop of your own with make_private_safe and DistributedDataParallel.",
            path="module",
        )
    if known and not trainer.lightning_module.automatic_optimization:
        raise ArgumentError(
            f"automatic_optimization=False together with {where}:",
            "which calls of the model belong to a step is the LightningModule's own business, and each has to be made by all "
            "processes.",
            "Return the loss from training_step, or use devices=1 and the default strategy.",
            path="trainer",
        )
    if SPREAD in kinds:
        if any(not getattr(callback, "save_weights_only", False) for callback in trainer.checkpoint_callbacks):
            _refuse_state()
        vars(strategy).update(dict.fromkeys(_OF_CHECKPOINTS, _refuse_state))


_OF_CHECKPOINTS = ("optimizer_state", "load_checkpoint")
"""Methods of a strategy for spread models that take the state of the optimizer."""


def _refuse_state(*_: Any, **__: Any) -> Any:
    """Raise, where the strategy would save or load the state of the optimizer.

    Raises:
        ArgumentError: always.
    """
    raise ArgumentError(
        "a checkpoint of the Trainer's with the optimizer's state, and strategy=ModelParallelStrategy(...):",
        "the strategy makes steps of the optimizer's to get that state, and the history of releases is not in it.",
        "Use enable_checkpointing=False or ModelCheckpoint(save_weights_only=True), and no ckpt_path. "
        "torch.distributed.checkpoint.save and load take the callback's `private`, on all ranks.",
        path="trainer",
    )


def end(trainer: Any) -> None:
    """The training is over: the strategy's methods are its own again."""
    for name in _OF_CHECKPOINTS:
        if vars(trainer.strategy).get(name) is _refuse_state:
            del vars(trainer.strategy)[name]


@contextmanager
def as_called(trainer: Any, root: nn.Module) -> Iterator[nn.Module]:
    """The model that the processes of a strategy train together, in the place of what the strategy has.

    Lightning calls its ``DistributedDataParallel`` with the batch and lets that call ``training_step``. In private training the
    wrapper is around the ``training_step``, and the loop calls that; so the strategy has the LightningModule itself.

    Args:
        trainer: the Trainer.
        root: what is called in training.

    Yields:
        The root, inside the strategy's wrapper if there is one.
    """
    wrapper = trainer.strategy.model
    if isinstance(root, TrainingStep) and isinstance(wrapper, DistributedDataParallel):
        own = wrapper.module
        wrapper.module = root
        try:
            yield wrapper
        except BaseException:
            wrapper.module = own
            raise
        trainer.strategy.model = own
    elif isinstance(root, TrainingStep) and any(isinstance(p, DTensor) for p in root.parameters()):
        yield from _spread(root)
    else:
        yield root


def _spread(root: TrainingStep) -> Iterator[nn.Module]:
    """``fully_shard`` on the root too: layers are put together in its calls, whichever of its parts ``training_step`` calls."""
    places = dict(root.module.named_parameters())
    whole = [name for name, p in places.items() if not isinstance(p, DTensor)]
    if whole:
        raise ModelError(
            Finding.refusal(
                "DPF053",
                f"parameter `{whole[0]}` of {type(root.module).__name__} is on every rank as a whole, while others are spread by "
                f"fully_shard ({len(whole)} such parameter(s)).",
                "its noise would have to be the same on all ranks, and theirs different.",
                "call fully_shard in configure_model on the parts that have these parameters too.",
                path=whole[0],
            )
        )
    mesh = next(p.device_mesh for p in places.values() if isinstance(p, DTensor))
    fully_shard(root, mesh=mesh)
    yield root
    root._get_fsdp_state()._lazy_init()  # type: ignore[attr-defined]  # a validation that calls a part would begin with that


def check_sampler(loader: Any) -> None:
    """A sampler of the script's that Lightning has put into its own is not known any more.

    Raises:
        LoaderError: with the way out.
    """
    sampler = getattr(loader, "sampler", None)
    if any(cls.__name__ == "DistributedSamplerWrapper" for cls in type(sampler).__mro__):
        inside = type(sampler.dataset._sampler).__name__  # type: ignore[union-attr]
        raise LoaderError(
            f"the Trainer has put a DistributedSampler around the {inside} of the training loader.",
            "which samples a process draws from is not seen from outside, and all processes together draw one batch here.",
            "Use Trainer(use_distributed_sampler=False); batch_size is then that of all processes together.",
            path="data_loader",
        )

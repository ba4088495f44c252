"""What a Trainer was asked for: what private training cannot do, and several processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dpfix.errors import ArgumentError


def on_ranks(trainer: Any) -> nn.Module:
    """The model of a Trainer, as the processes that were started together train it.

    Returns:
        The model, inside a ``DistributedDataParallel`` if there are several.
    """
    if trainer.args.world_size == 1:
        return trainer.model
    device = trainer.args.device
    return DistributedDataParallel(trainer.model, device_ids=None if device.type == "cpu" else [device.index])


def _of_several(trainer: Any) -> Sequence[tuple[bool, str, str, str]]:
    args = trainer.args
    return (
        (
            bool(getattr(trainer, "is_fsdp_enabled", False)),
            "fsdp",
            "it spreads the model after it was made private, and what was checked is then another model.",
            "Leave fsdp out: torchrun alone shares batches out (DistributedDataParallel). A loop of your own takes a model on "
            "which torch.distributed.fsdp.fully_shard was called.",
        ),
        (
            bool(getattr(trainer, "is_deepspeed_enabled", False)),
            "deepspeed",
            "it adds up gradients of several processes before they are clipped.",
            "Leave deepspeed out: torchrun alone shares batches out (DistributedDataParallel).",
        ),
        (
            args.world_size > 1 and bool(args.label_smoothing_factor),
            f"label_smoothing_factor={args.label_smoothing_factor} and {args.world_size} processes",
            "the Trainer asks the model's class whether labels are shifted, and does not see it behind the wrapper.",
            "Leave label_smoothing_factor out, or train with one process.",
        ),
    )


def check_trainer(trainer: Any) -> None:
    """Refuse what a Trainer was asked for and private training cannot do.

    Args:
        trainer: the Trainer.

    Raises:
        ArgumentError: with the way out.
    """
    args = trainer.args
    for asked, fact, why, way in (*_refusals(args), *_of_several(trainer)):
        if asked:
            raise ArgumentError(f"the Trainer was made with {fact}:", why, way, path="trainer.args")
    if getattr(trainer, "train_dataset", None) is None:
        raise ArgumentError(
            "the Trainer has no train_dataset:", help="Pass train_dataset= to Trainer.", path="trainer.train_dataset"
        )


def _refusals(args: Any) -> Sequence[tuple[bool, str, str, str]]:
    accumulates = args.gradient_accumulation_steps
    size = accumulates * args.per_device_train_batch_size
    return (
        (
            accumulates > 1,
            f"gradient_accumulation_steps={accumulates}",
            "a step is accounted as one Poisson draw, and a sample may be in several of those that would be added up.",
            f"Use per_device_train_batch_size={size} and gradient_accumulation_steps=1: the same expected batch size.",
        ),
        (
            bool(args.fp16),
            "fp16=True",
            "gradients would be scaled, and clipped at another norm than the accountant counts.",
            "Use bf16=True, or leave mixed precision out.",
        ),
        (
            args.n_gpu > 1,
            f"{args.n_gpu} devices in one process",
            "its DataParallel averages gradients before they are clipped.",
            "Use one device (CUDA_VISIBLE_DEVICES=0), or start one process for each: torchrun --nproc-per-node 2 script.py.",
        ),
        (
            bool(getattr(args, "auto_find_batch_size", False)),
            "auto_find_batch_size=True",
            "another batch size is another sampling rate.",
            "Set per_device_train_batch_size and leave auto_find_batch_size out.",
        ),
        (
            bool(getattr(args, "packing", False) or getattr(args, "padding_free", False)),
            "packing or padding_free",
            "a row of a packed batch holds texts of several samples, and one text more shifts all that follow.",
            "Use packing=False and padding_free=False: one text is one sample.",
        ),
        (
            bool(getattr(args, "use_liger_kernel", False)),
            "use_liger_kernel=True",
            "its fused layers compute gradients of the whole batch only.",
            "Leave use_liger_kernel out.",
        ),
    )

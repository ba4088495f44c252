"""Losses under DP-SGD: why one couples the samples of a batch, and the general cure."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from dpfix import trees
from dpfix.errors import LossError

_BATCH_STATISTIC = ("ntxent", "contrastive", "barlow", "vicreg", "cox", "infonce", "supcon", "clip")
_WEIGHTED_MEAN = (nn.CrossEntropyLoss, nn.NLLLoss)


class PerSampleLoss(nn.Module):
    """Any criterion, applied to every sample alone and averaged.

    The loss of a batch becomes ``(1/n) sum_i criterion(output_i, target_i)``, each sample as a batch of one. For a
    criterion that is already a mean over samples this is the same number; for one that couples them (class weights with
    a mean, ``ignore_index``, Dice over the batch) it is the loss whose share of sample i depends on sample i alone.

    A sample in which nothing counts (every target is ``ignore_index``) contributes 0 instead of 0/0.

    Args:
        criterion: any loss: ``criterion(output, target, ...) -> scalar``. Outputs and targets may be nested (deep
            supervision); every tensor in them has the samples in dimension 0.

    >>> loss = PerSampleLoss(nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0])))
    >>> round(float(loss(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]))), 4)
    0.2201
    """

    def __init__(self, criterion: Callable[..., Any]) -> None:
        super().__init__()
        self.criterion = criterion

    def forward(self, *arguments: Any, **keywords: Any) -> torch.Tensor:
        """The mean of the samples' losses.

        Args:
            *arguments: the criterion's arguments; tensors have shape ``[samples, ...]``.
            **keywords: the criterion's keyword arguments; tensors likewise.

        Returns:
            A scalar.

        Raises:
            LossError: the tensors hold different numbers of samples, or none.
        """
        samples = _samples((arguments, keywords))
        losses = [self._one(arguments, keywords, i) for i in range(samples)]
        return torch.stack(losses).mean()

    def _one(self, arguments: Any, keywords: Any, i: int) -> torch.Tensor:
        def take(_: trees.Path, leaf: Any) -> Any:
            return leaf[i : i + 1] if isinstance(leaf, torch.Tensor) and leaf.dim() else leaf

        args, kwargs = trees.map_leaves(take, (arguments, keywords))
        if _nothing_counts(self.criterion, args):
            return sum((t.sum() * 0 for t in trees.gradient_tensors(args)), args[0].new_zeros(()))
        return self.criterion(*args, **kwargs)


def _samples(tree: Any) -> int:
    sizes = {t.shape[0] for t in trees.tensors(tree) if t.dim()}
    if len(sizes) != 1 or 0 in sizes:
        raise LossError(
            f"PerSampleLoss got tensors with {sorted(sizes)} rows in dimension 0; every output and target has to hold the "
            "same samples, at least one. Pass per-sample outputs and targets, [samples, ...] each."
        )
    return sizes.pop()


def _nothing_counts(criterion: Any, args: tuple[Any, ...]) -> bool:
    ignore = getattr(criterion, "ignore_index", None)
    if ignore is None or len(args) < 2 or not isinstance(args[1], torch.Tensor) or args[1].is_floating_point():
        return False
    return bool((args[1] == ignore).all())


def coupling_causes(
    criterion: Callable[..., Any] | None, training_step: Callable[..., Any] | None, batch: Any
) -> list[str]:
    """Why a loss may couple the samples, as far as its objects and the data show.

    Args:
        criterion: the criterion of the call, if any.
        training_step: the user's training step, if any; losses it refers to are looked at too.
        batch: a probe batch.

    Returns:
        Sentences naming the object and the setting, most telling first.
    """
    found = [cause for loss in _losses(criterion, training_step) for cause in _causes(loss)]
    integers = [t for t in trees.tensors(batch) if not t.is_floating_point() and not t.is_complex() and t.numel()]
    if not found and any(bool((t == -100).any()) for t in integers):
        found.append("targets of -100 (ignore_index) with a mean over the valid elements of the whole batch")
    return list(dict.fromkeys(found))


def _losses(criterion: Any, training_step: Any) -> Iterator[nn.Module]:
    objects = [criterion]
    if inspect.isfunction(training_step):
        variables = inspect.getclosurevars(training_step)
        objects += [*variables.nonlocals.values(), *variables.globals.values()]
    for thing in objects:
        if isinstance(thing, nn.Module) and not isinstance(thing, PerSampleLoss) and not any(thing.parameters()):
            yield from thing.modules()


def _causes(loss: nn.Module) -> Iterator[str]:
    name = type(loss).__name__
    for attribute in ("batch", "batch_dice"):
        if getattr(loss, attribute, None) is True:
            yield f"{name}({attribute}=True) sums over the batch before it divides"
    mean = getattr(loss, "reduction", None) in ("mean", None)
    if isinstance(loss, _WEIGHTED_MEAN) and mean and loss.weight is not None:
        yield f"{name}(weight=..., reduction='mean') divides by the weights of the whole batch"
    if isinstance(loss, _WEIGHTED_MEAN) and mean and loss.ignore_index != -100:
        yield f"{name}(ignore_index={loss.ignore_index}) divides by the number of valid elements of the whole batch"
    if "topk" in name.lower():
        yield f"{name} keeps the worst elements of the whole batch"
    if any(word in name.lower() for word in _BATCH_STATISTIC):
        yield f"{name} compares the samples of the batch with each other"

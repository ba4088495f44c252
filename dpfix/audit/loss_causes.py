"""Why a loss couples the samples of a batch, as far as its objects and the data show."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import nn

from dpfix.instrument import pytree
from dpfix.repair.per_sample_loss import (
    PerSampleLoss,
)

_BATCH_STATISTIC = ("ntxent", "contrastive", "barlow", "vicreg", "cox", "infonce", "supcon", "clip")
_WEIGHTED_MEAN = (nn.CrossEntropyLoss, nn.NLLLoss)


def coupling_causes(
    criterion: Callable[..., Any] | None, training_step: Callable[..., Any] | None, batch: Any
) -> list[str]:
    """Why a loss may couple the samples, as far as its objects and the data show.

    Args:
        training_step: the user's training step, if any; losses it refers to are looked at too.

    Returns:
        Sentences naming the object and the setting, most telling first.
    """
    found = [cause for loss in _losses(criterion, training_step) for cause in _causes(loss)]
    integers = [t for t in pytree.tensors(batch) if not t.is_floating_point() and not t.is_complex() and t.numel()]
    if not found and any(bool((t == -100).any()) for t in integers):
        found.append("targets of -100 (ignore_index) with a mean over the valid elements of the whole batch")
    return list(dict.fromkeys(found))


def _losses(criterion: Any, training_step: Any) -> Iterator[nn.Module]:
    for thing in referenced(criterion, training_step):
        if not isinstance(thing, PerSampleLoss) and next(thing.parameters(), None) is None:
            yield from thing.modules()


def referenced(criterion: Any, training_step: Any) -> Iterator[nn.Module]:
    """The modules that a criterion and a training step are made of, as far as names and closures show.

    Args:
        training_step: the training step of the call, if any: a function, a method, or a ``functools.partial``.

    Yields:
        The criterion, if it is a module, and modules that the functions refer to.
    """
    todo, seen = [criterion, training_step], set[int]()
    while todo:
        thing = todo.pop(0)
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, nn.Module):
            yield thing
        elif isinstance(thing, partial):
            todo += [thing.func, *thing.args, *thing.keywords.values()]
        elif inspect.ismethod(thing):
            own = thing.__self__
            todo += [thing.__func__, *([own] if isinstance(own, nn.Module) else getattr(own, "__dict__", {}).values())]
        elif inspect.isfunction(thing) and not (thing.__module__ or "").startswith("torch"):
            variables = inspect.getclosurevars(thing)
            todo += [*variables.nonlocals.values(), *variables.globals.values()]


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

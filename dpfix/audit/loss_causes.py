"""Why a loss couples the samples of a batch, as far as its objects and the data show."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

import torch
from torch import nn

from dpfix.instrument import pytree
from dpfix.instrument.module_state import finished
from dpfix.instrument.reachable import is_number, reachable
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


def telling_numbers(criterion: Any, training_step: Any) -> tuple[int | float, ...]:
    """Numbers that may mean something to a loss: labels that are ignored, weighted most and least, or stand in its code.

    Args:
        training_step: the training step; what it refers to is looked at too.

    Returns:
        At most a dozen, most telling first.
    """
    found: list[int | float] = []
    mentioned: list[int | float] = []
    for thing in reachable(criterion, training_step):
        if isinstance(thing, nn.Module):
            for loss in thing.modules() if next(thing.parameters(), None) is None else ():
                own = vars(loss).get("ignore_index")
                found += [own] if isinstance(own, int) and own != -100 else []  # the default says nothing
                for weight in (*loss._buffers.values(), *vars(loss).values()):
                    found += _heaviest_and_lightest(weight)
                if not type(loss).__module__.startswith(("torch", "dpfix")):
                    mentioned += [v for v in vars(loss).values() if is_number(v)]
                    mentioned += _constants(getattr(type(loss).forward, "__code__", None))
        elif isinstance(thing, torch.Tensor):
            found += _heaviest_and_lightest(thing)
        elif is_number(thing):
            mentioned.append(thing)
        elif inspect.isfunction(thing) and not (thing.__module__ or "").startswith("dpfix"):
            mentioned += _constants(thing.__code__)
    return tuple({str(float(v)): v for v in (*found, *mentioned) if abs(v) < 2**31 or v != v}.values())[:_MOST_TOLD]


_MOST_TOLD = 12


def _heaviest_and_lightest(weight: Any) -> list[int | float]:
    """The classes with the largest and the smallest weight, if this is one weight per class."""
    if not isinstance(weight, torch.Tensor) or weight.dim() != 1 or not 2 <= len(weight) <= 2**16:
        return []
    if isinstance(weight, nn.Parameter) or not weight.is_floating_point() or bool((weight == weight[0]).all()):
        return []
    return [int(weight.argmax()), int(weight.argmin())]


def _constants(code: CodeType | None) -> Iterator[int | float]:
    """Numbers in the code of a function, and NaN where it asks for missing values."""
    if code is None:
        return
    if any("nan" in name or "finite" in name for name in code.co_names):
        yield float("nan")
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _constants(constant)
        elif is_number(constant):
            yield constant


def _losses(criterion: Any, training_step: Any) -> Iterator[nn.Module]:
    for thing in referenced(criterion, training_step):
        if not isinstance(thing, PerSampleLoss) and next(thing.parameters(), None) is None:
            yield from thing.modules()


def referenced(criterion: Any, training_step: Any) -> Iterator[nn.Module]:
    """The modules that a criterion and a training step are made of, as far as names and closures show.

    Args:
        training_step: the training step of the call, if any: a function, a method, or a ``functools.partial``.

    Returns:
        The criterion, if it is a module, and modules that the functions refer to.
    """
    return (thing for thing in reachable(criterion, training_step) if finished(thing))


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

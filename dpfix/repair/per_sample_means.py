"""The cure of a mean over the elements of a whole batch that is taken inside a model, where no criterion can be wrapped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from dpfix.engines.replaced import takes_gradients
from dpfix.instrument import pytree
from dpfix.instrument.function_modes import unfollowed

_ARGUMENTS = {
    F.cross_entropy: ("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction"),
    F.nll_loss: ("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction"),
}
"""Losses whose mean is one over the targets that count, with the order of their arguments."""
_IGNORE = -100


class PerSampleMeans(TorchFunctionMode):
    """Inside, a cross-entropy over the targets of a batch is the mean of the samples' means.

    It is recognised by its targets: those that the batch holds, as they are or shifted by one position, with others that are
    ignored before or after them. A sample in which nothing counts contributes 0. All else is computed as it is.

    Args:
        batch: what the model is called with; a tensor of whole numbers has the samples in dimension 0.
        changes: called when a mean over several targets per sample is taken otherwise.
    """

    def __init__(self, batch: Any, changes: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self._changes = changes
        self._labels = [t for t in pytree.tensors(batch) if t.dim() and t.numel() and _is_whole(t)]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names, kwargs = _ARGUMENTS.get(func), kwargs or {}
        if names is None or torch._C._are_functorch_transforms_active():  # type: ignore[attr-defined]
            return func(*args, **kwargs)
        given = dict(zip(names, args, strict=False)) | kwargs
        mean = given.get("reduction", "mean") == "mean"
        if not mean or given.get("size_average") is not None or given.get("reduce") is not None:
            return func(*args, **kwargs)
        with unfollowed(), torch.no_grad():
            samples = self._samples(given["target"], given.get("ignore_index", _IGNORE))
        return self._mean(func, samples, given) if samples else func(*args, **kwargs)

    def _mean(self, func: Callable[..., torch.Tensor], samples: int, given: dict[str, Any]) -> torch.Tensor:
        target, ignored = given["target"], given.get("ignore_index", _IGNORE)
        losses = func(**given | {"reduction": "none"})
        weight, counts = given.get("weight"), target != ignored
        weights = counts.to(losses.dtype) if weight is None else weight[target.where(counts, 0)] * counts
        total, share = losses.reshape(samples, -1).sum(1), weights.reshape(samples, -1).sum(1)
        if target.numel() > samples:
            self._changes()
        return (total / share.where(share > 0, 1)).mean()

    def _samples(self, target: torch.Tensor, ignored: int) -> int:
        """How many samples the targets belong to; 0 if they are not those of the batch."""
        if not isinstance(target, torch.Tensor) or not _is_whole(target):
            return 0
        for labels in self._labels:
            samples = len(labels)
            if target.numel() % samples == 0 and target.numel():
                rows = target.reshape(samples, -1)
                if any(_holds(rows, part, ignored) for part in _shifted(labels.reshape(samples, -1).to(rows))):
                    return samples
        return 0


class MeansPerSample:
    """Has :class:`PerSampleMeans` on wherever a model is called in training; part of the model, and of its copies.

    Args:
        noted: the one whose :attr:`changed` tells of copies too.

    Attributes:
        changed: whether anything was computed otherwise.
    """

    part_of_the_model = True

    def __init__(self, noted: MeansPerSample | None = None) -> None:
        self.changed = False
        self._noted = noted or self
        self._on: list[PerSampleMeans | None] = []

    def put_on(self, module: nn.Module) -> Callable[[], None]:
        """From now on.

        Returns:
            Takes it off the model again.
        """
        handles = (
            module.register_forward_pre_hook(self.begin, with_kwargs=True, prepend=True),
            module.register_forward_hook(self.end, always_call=True),
        )

        def take_off() -> None:
            for handle in handles:
                handle.remove()

        return take_off

    def begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """The model is called."""
        on = PerSampleMeans((args, kwargs), self._note) if takes_gradients(module) else None
        self._on.append(on)
        if on is not None:
            on.__enter__()

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """The call is over."""
        on = self._on.pop() if self._on else None
        if on is not None:
            on.__exit__(None, None, None)

    def _note(self) -> None:
        self._noted.changed = True

    def __deepcopy__(self, memo: Any) -> MeansPerSample:
        return MeansPerSample(self._noted)

    def __reduce__(self) -> Any:
        return MeansPerSample, ()


def _is_whole(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() and not tensor.is_complex() and tensor.dtype is not torch.bool


def _shifted(labels: torch.Tensor) -> Iterator[torch.Tensor]:
    yield labels
    if labels.shape[1] > 1:
        yield labels[:, 1:]
        yield labels[:, :-1]


def _holds(rows: torch.Tensor, labels: torch.Tensor, ignored: int) -> bool:
    """Whether every row is a sample's labels, and ignored targets around them."""
    more = rows.shape[1] - labels.shape[1]
    for start in {0, more, more - 1} if more > 0 else {more}:
        if start >= 0:
            before, inside, after = rows.split((start, labels.shape[1], more - start), 1)
            if torch.equal(inside, labels) and bool((before == ignored).all()) and bool((after == ignored).all()):
                return True
    return False

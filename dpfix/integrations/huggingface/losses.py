"""The loss of a Trainer as a mean over samples, each of which counts alone.

``Trainer`` divides the loss by the number of tokens of the whole batch (``num_items_in_batch``). What is one sample's share then
depends on how long the others are. Both ways here leave that number out, and average the losses that the samples have alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from dpfix.instrument import pytree
from dpfix.repair.per_sample_means import MeansPerSample

ComputeLoss = Callable[..., Any]
"""``Trainer.compute_loss``."""


class MeansInside:
    """For a loss that the model computes: its mean over all tokens becomes one over the samples' means."""

    place = "inside the model"

    def __init__(self) -> None:
        self._means = MeansPerSample()

    @property
    def changed(self) -> bool:
        """Whether there was such a mean."""
        return self._means.changed

    def put_on(self, model: nn.Module) -> Callable[[], None]:
        """Prepare a model.

        Returns:
            Leaves it as it was.
        """
        return self._means.put_on(model)

    def __call__(self, compute: ComputeLoss, model: nn.Module, inputs: Mapping[str, Any], **options: Any) -> Any:
        """The loss of a batch, as ``compute_loss`` returns it."""
        return compute(model, dict(inputs), num_items_in_batch=None, **options)


class SampleBySample:
    """For a loss that is computed from the model's outputs: it is computed from those of every sample alone.

    The model is called once, with the whole batch.
    """

    place = "from the outputs of the model"
    changed = True

    def put_on(self, model: nn.Module) -> Callable[[], None]:
        """As above; there is nothing to prepare."""
        return lambda: None

    def __call__(
        self,
        compute: ComputeLoss,
        model: nn.Module,
        inputs: Mapping[str, Any],
        *,
        return_outputs: bool = False,
        **options: Any,
    ) -> Any:
        """The loss of a batch, as ``compute_loss`` returns it."""
        samples = next((len(t) for t in pytree.tensors(inputs) if t.dim()), 1)
        batch = _Batch(model, inputs, samples)
        losses = [
            compute(_OneSample(batch, i), batch.inputs_of(i), num_items_in_batch=None, **options)
            for i in range(samples)
        ]
        loss = torch.stack(losses).mean()
        return (loss, batch.outputs[0][0]) if return_outputs else loss


def loss_of(trainer: Any, compute: ComputeLoss) -> tuple[ComputeLoss, Callable[[], None]]:
    """What computes the loss of a Trainer.

    TRL's ``SFTTrainer`` asks the model for fused pieces of its loss, made by a function on the weights of the head. Where these
    add up to the loss that the model itself computes, the model does.

    Args:
        trainer: the Trainer.
        compute: its ``compute_loss``.

    Returns:
        What takes its place, and what leaves the model as it was.
    """
    own = type(trainer).compute_loss
    plain = getattr(trainer.args, "loss_type", "") == "nll" and not getattr(trainer, "aux_loss_enabled", False)
    if not (own.__module__.startswith("trl.") and own.__qualname__ == "SFTTrainer.compute_loss" and plain):
        return compute, lambda: None
    patched = {
        module: vars(module).pop("forward")
        for module in trainer.model.modules()
        if _is_trls(vars(module).get("forward"))
    }

    def put_back() -> None:
        for module, forward in patched.items():
            vars(module)["forward"] = forward

    return MethodType(Trainer.compute_loss, trainer), put_back


def _is_trls(forward: Any) -> bool:
    function = getattr(forward, "__func__", None)
    return getattr(function, "__globals__", {}).get("__name__", "").startswith("trl.")


@dataclass
class _Batch:
    """The calls of a model with a batch, and the rows of every sample in them.

    Attributes:
        outputs: what the model returned, call by call, whole and by sample.
    """

    model: nn.Module
    inputs: Mapping[str, Any]
    samples: int
    outputs: list[tuple[Any, list[Any]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._singles = self._rows(self.inputs)

    def inputs_of(self, sample: int) -> dict[str, Any]:
        return dict(self._singles[sample])

    def output_of(self, sample: int, call: int, kwargs: Mapping[str, Any]) -> Any:
        if call == len(self.outputs):
            own = self._singles[sample]
            whole = {k: self.inputs[k] if k in own and v is own[k] else v for k, v in kwargs.items()}
            found = self.model(**whole)
            self.outputs.append((found, self._rows(found)))
        return self.outputs[call][1][sample]

    def _rows(self, tree: Any) -> list[Any]:
        """The rows of every sample in a tree, all cut in one operation each."""
        tensors = [t for t in pytree.tensors(tree) if t.dim() and len(t) == self.samples]
        rows = {id(t): t.split(1) for t in tensors}

        def of(sample: int) -> Any:
            return pytree.map_leaves(lambda _, leaf: rows[id(leaf)][sample] if id(leaf) in rows else leaf, tree)

        return [of(sample) for sample in range(self.samples)]


class _OneSample:
    """Stands in for a model that was called with one sample."""

    def __init__(self, batch: _Batch, sample: int) -> None:
        self._batch, self._sample, self._calls = batch, sample, 0

    @property
    def __class__(self) -> Any:  # a trainer asks of which class its model is
        return type(self._batch.model)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batch.model, name)

    def __call__(self, **kwargs: Any) -> Any:
        self._calls += 1
        return self._batch.output_of(self._sample, self._calls - 1, kwargs)

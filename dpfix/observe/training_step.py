"""How the script goes from a batch to a loss: given by the user, or told from the batch's structure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from dpfix.errors import TrainingStepError
from dpfix.instrument import pytree
from dpfix.instrument.own_generators import Own, own_generators
from dpfix.report.finding import Finding

StepFunction = Callable[[nn.Module, Any], torch.Tensor]


class UnknownCallError(TrainingStepError):
    """How the loop calls the model cannot be told from one batch; the first real call shows it."""


@dataclass(frozen=True)
class TrainingStep:
    """From ``(model, batch)`` to a scalar loss.

    Attributes:
        run: the function.
        origin: one line for the report: where the function comes from.
        loss_known: whether ``run`` computes the script's own loss; if not, a stand-in for it.
        guessed: whether the call was told from the structure of one batch; the loop's own may be another.
    """

    run: StepFunction
    origin: str
    loss_known: bool
    guessed: bool = False

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """Run the step on one batch of the loader.

        Returns:
            The scalar loss.

        Raises:
            TrainingStepError: the step does not end in a scalar that depends on a parameter.
        """
        loss = self.run(model, batch)
        if not torch.is_tensor(loss) or loss.numel() != 1:
            kind = f"a tensor of shape {tuple(loss.shape)}" if torch.is_tensor(loss) else type(loss).__name__
            raise TrainingStepError(
                f"training_step returned {kind}, not a scalar loss ({self.origin}).",
                "Per-sample clipping needs the loss the script calls backward() on.",
                "Return that loss from training_step.",
                path="training_step",
            )
        if not loss.requires_grad:
            raise TrainingStepError(
                f"the loss of training_step depends on no trainable parameter ({self.origin}).",
                "There is nothing to train;",
                "check requires_grad of the parameters and any no_grad block.",
                path="training_step",
            )
        return loss.reshape(())


@dataclass(frozen=True)
class Subject:
    """What is observed and audited.

    Attributes:
        module: the repaired model, in training mode.
        step: from batch to loss.
    """

    module: nn.Module
    step: TrainingStep

    @cached_property
    def generators(self) -> Own:
        """Generators of random numbers that the model and the step keep themselves, with their first states."""
        return own_generators(self.module, self.step.run)

    def trained(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by name."""
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def loss(self, batch: Any) -> torch.Tensor:
        """The loss of a batch on the plain model; see :meth:`TrainingStep.loss`."""
        return self.step.loss(self.module, batch)


def unknown_loss(step: TrainingStep) -> list[Finding]:
    """Advice about a loss that is checked on the first real steps only; none where it is known."""
    if step.loss_known:
        return []
    return [
        Finding.advice(
            "DPF020",
            f"the loop's loss is not known ({step.origin}).",
            "whether it couples the samples (batch Dice, class weights with mean, ignore_index) is checked on the first "
            "real steps, in backward().",
            help="pass criterion= or training_step= to have it checked before training, on harder samples too.",
            path="training_step",
        )
    ]


def infer(
    batch: Any, criterion: Callable[..., Any] | None, given: StepFunction | None, loss_reduction: str = "mean"
) -> TrainingStep:
    """Tell how this script goes from a batch to a loss.

    ``training_step`` wins; otherwise the batch's structure and ``criterion`` decide: ``(x, y)``,
    MONAI's ``image``/``label``, or keyword arguments whose output has a ``loss`` (Hugging Face). Without
    a criterion the model is called the same way and a stand-in loss over its outputs is used.

    Args:
        criterion: the script's loss function, if the call named one.
        given: the user's own ``training_step``.
        loss_reduction: ``"mean"`` or ``"sum"`` over the samples; a stand-in loss follows it.

    Returns:
        The training step; ``loss_known`` is false for a stand-in loss.

    Raises:
        UnknownCallError: the structure is unknown.
    """
    if given is not None:
        return TrainingStep(given, "training_step as given", loss_known=True)
    if isinstance(batch, Mapping):
        return _from_mapping(batch, criterion, loss_reduction)
    if isinstance(batch, (list, tuple)) and len(batch) >= 2:
        return _step(
            lambda b: tuple(b[:-1]), lambda b: b[-1], criterion, "model(*batch[:-1]), batch[-1]", loss_reduction
        )
    if isinstance(batch, (list, tuple)) and len(batch) == 1:
        return _step(lambda b: (b[0],), None, criterion, "model(batch[0])", loss_reduction)
    if torch.is_tensor(batch):
        return _step(lambda b: (b,), None, criterion, "model(batch)", loss_reduction)
    raise UnknownCallError(
        f"data_loader delivers {type(batch).__name__};",
        "dpfix cannot tell how a batch becomes a loss.",
        "Pass training_step=lambda model, batch: <the loss your loop computes>.",
        path="training_step",
    )


def _from_mapping(batch: Mapping[Any, Any], criterion: Callable[..., Any] | None, loss_reduction: str) -> TrainingStep:
    for x, y in (("image", "label"), ("input", "target"), ("x", "y")):
        if x in batch and y in batch:
            text = f'model(batch["{x}"]), batch["{y}"]'
            return _step(lambda b, x=x: (b[x],), lambda b, y=y: b[y], criterion, text, loss_reduction)

    def run(model: nn.Module, b: Mapping[Any, Any]) -> torch.Tensor:
        out = model(**b)
        loss = out.get("loss") if isinstance(out, Mapping) else getattr(out, "loss", None)
        if loss is None:
            raise UnknownCallError(
                f"data_loader delivers a mapping with keys {sorted(map(str, b))};",
                "model(**batch) gives no `loss`, so dpfix cannot tell the loss.",
                "Pass training_step=lambda model, batch: <your loss>.",
                path="training_step",
            )
        return loss

    return TrainingStep(run, "inferred: model(**batch).loss", loss_known=True, guessed=True)


def _step(
    inputs: Callable[[Any], tuple[Any, ...]],
    target: Callable[[Any], Any] | None,
    criterion: Callable[..., Any] | None,
    text: str,
    loss_reduction: str,
) -> TrainingStep:
    if criterion is None:

        def stand_in(model: nn.Module, batch: Any) -> torch.Tensor:
            return surrogate_loss(model(*inputs(batch)), loss_reduction)

        return TrainingStep(stand_in, f"inferred: {text.split(',', 1)[0]} with a stand-in loss", False, guessed=True)

    def run(model: nn.Module, batch: Any) -> torch.Tensor:
        output = model(*inputs(batch))
        return criterion(output) if target is None else criterion(output, target(batch))

    return TrainingStep(run, f"inferred: criterion({text})", loss_known=True, guessed=True)


def surrogate_loss(output: Any, loss_reduction: str = "mean") -> torch.Tensor:
    """A per-sample loss over whatever a model returns, for when the script's loss is not known.

    Every floating output enters with a fixed weight along its last dimension and a small square, so
    that no output is without gradient and no two rows can be exchanged unnoticed.

    Returns:
        The mean (or sum) over all elements, summed over the outputs: a scalar.

    Raises:
        TrainingStepError: no output carries gradient.
    """
    outputs = [t for t in pytree.gradient_tensors(output) if t.is_floating_point()]
    if not outputs:
        raise TrainingStepError(
            "no output of the model carries gradient,",
            "so no parameter can be trained.",
            "Check requires_grad of the parameters and any no_grad block in forward.",
            path="module",
        )
    total = outputs[0].new_zeros(())
    for t in outputs:
        values = t.as_subclass(torch.Tensor)
        features = t.shape[-1] if t.dim() > 1 else 1  # one number per sample has no features
        positions = torch.arange(features, device=t.device, dtype=t.dtype)
        losses = values * torch.cos(positions) + 0.1 * values.square()
        total = total + (losses.mean() if loss_reduction == "mean" else losses.sum())
    return total

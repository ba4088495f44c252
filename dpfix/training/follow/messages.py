"""What is said when a real step fails its check."""

from __future__ import annotations

import math
from typing import Any

from dpfix.errors import CoupledLossError, CoupledModelError, LossError, MisuseError, StateWrittenError
from dpfix.instrument import pytree
from dpfix.instrument.source import line_of_code
from dpfix.report.finding import Finding

NOTHING_RELEASED = "No parameter has moved in this step."


def coupled_input(gap: float, argument: str, line: str, model: str) -> CoupledModelError:
    """The script mixes samples before the model."""
    return CoupledModelError(
        Finding.refusal(
            "DPF041",
            f"the loop mixes the samples of a batch before it calls {model}{_at(line)}: with other samples in the batch, one "
            f"sample's part of {argument} changes by {gap:.1e} (relative).",
            "what the model sees of one sample then depends on the others, so clipping per sample bounds nothing. Known "
            "causes: a mean, maximum or standard deviation over the batch, mixup or CutMix, in-batch negatives.",
            "compute it per sample, or with constants that do not come from the batch (statistics of a public data set); augment "
            f"every sample alone. {NOTHING_RELEASED}",
            path="data_loader",
        )
    )


_BY_PLACE = (
    "the rows of a person are those at the places of her items; in another order they would be clipped as another's, "
    "who could then move the released sum by more than the clip norm."
)


def _described(collate: Any) -> str:
    return f"collate_fn ({getattr(collate, '__name__', type(collate).__name__)}, {line_of_code(collate)})"


def coupled_collation(gap: float, path: pytree.Path, collate: Any) -> CoupledModelError:
    """The collate function mixes samples."""
    made = f"entry {'.'.join(map(str, path))}" if path else "its part of the batch"
    by = f"by {gap:.1e} (relative)" if math.isfinite(gap) else "with them"
    return CoupledModelError(
        Finding.refusal(
            "DPF046",
            f"{_described(collate)} mixes the samples of a batch: with other samples beside it, {made} of one sample changes "
            f"{by}.",
            "what is computed from it depends on the others too, so clipping per sample bounds nothing. Known causes: statistics "
            "of the batch (a mean, a maximum, counts of classes), padding with them, mixup or CutMix.",
            "compute it per sample, in dataset[i] or one by one in the collate_fn, or with constants that do not come from the "
            f"batch; augment every sample alone; pad with a constant. {NOTHING_RELEASED}",
            path="data_loader",
        )
    )


def moved_by_collation(collate: Any) -> CoupledModelError:
    """The collate function puts the items of persons into another order."""
    return CoupledModelError(
        Finding.refusal(
            "DPF049",
            f"{_described(collate)} puts the items of a batch into an order of its own.",
            _BY_PLACE,
            "leave the order as it is: sort or shuffle in the model, or pack with enforce_sorted=False. "
            f"{NOTHING_RELEASED}",
            path="data_loader",
        )
    )


def moved_by_loop(name: str) -> CoupledModelError:
    """The loop puts the items of persons into another order."""
    return CoupledModelError(
        Finding.refusal(
            "DPF041",
            f"the loop puts the rows of a batch into another order before it calls {name}.",
            _BY_PLACE,
            f"call the model with the rows in the order in which the data_loader delivers them. {NOTHING_RELEASED}",
            path="training_step",
        )
    )


def coupled_model(gap: float, module: str) -> CoupledModelError:
    """The model mixes samples on this batch."""
    return CoupledModelError(
        Finding.refusal(
            "DPF013",
            f"{module} mixes the samples of a batch on real data: with other samples in the batch, one sample's output changes "
            f"by {gap:.1e} (relative).",
            "sample i's output depends on sample j, so clipping per sample bounds nothing. The probe did not show it: a branch "
            "that is taken by chance or for some data only, or a layer that was switched on since.",
            "replace what is computed over the batch (a mean, a normalisation, mixing of features) by something per sample. "
            f"{NOTHING_RELEASED}",
            path="module",
        )
    )


def feels_length(gap: float, line: str, model: str) -> CoupledModelError:
    """Padding matters."""
    return CoupledModelError(
        Finding.refusal(
            "DPF041",
            f"the batch is cut to the length of its longest sample{_at(line)} before {model} is called, and one sample's output "
            f"changes by {gap:.1e} (relative) with that length.",
            "padding is not masked, so that a sample's gradient depends on how long the others are, and clipping per sample "
            "bounds nothing.",
            f"mask the padding (attention_mask, lengths), or pad every sample to one fixed length. {NOTHING_RELEASED}",
            path="data_loader",
        )
    )


def coupled_loss(gap: float, place: str) -> CoupledLossError:
    """The loss couples samples."""
    return CoupledLossError(
        Finding.refusal(
            "DPF014",
            f"the loss on which backward() is called ({place or 'place unknown'}) couples the samples of a batch: exchanging the "
            f"other samples changes the gradient of one sample's output by {gap:.1e} (relative).",
            "one sample's share of the loss depends on the others, so clipping per sample bounds nothing. Known causes: a "
            "mean over the valid elements of the batch (ignore_index), class weights with reduction='mean', batch=True in a Dice "
            "loss, a contrastive or rank loss.",
            "criterion = dpfix.PerSampleLoss(criterion)  # applies any criterion to every sample alone, then averages. "
            f"{NOTHING_RELEASED}",
            path="criterion",
        )
    )


def coupled_number(line: str, place: str) -> CoupledLossError:
    """The loss is computed with a number of the whole batch."""
    return CoupledLossError(
        Finding.refusal(
            "DPF014",
            f"the loss on which backward() is called ({place or 'place unknown'}) couples the samples of a batch: it is computed "
            f"with a Python number{_at(line)} that is a count or a sum over the batch, or its inverse, and changes with the "
            "other samples.",
            "one sample's share of the loss depends on the others, so clipping per sample bounds nothing.",
            "divide every sample's loss by its own count and take the mean over the samples, or by a constant. "
            f"dpfix.PerSampleLoss(criterion) does the first for any criterion. {NOTHING_RELEASED}",
            path="criterion",
        )
    )


def other_reduction(other: str, place: str) -> LossError:
    """The loss is of another reduction than was announced."""
    announced = "sum" if other == "mean" else "mean"
    return LossError(
        Finding.refusal(
            "DPF015",
            f"the loss on which backward() is called ({place or 'place unknown'}) is a {other} over the samples, but "
            f"loss_reduction='{announced}' was announced.",
            "per-sample gradients would be scaled by the batch size before clipping.",
            f"pass loss_reduction='{other}' to make_private_safe, or use reduction='{announced}' in the criterion.",
            path="loss_reduction",
        )
    )


def kept(line: str) -> StateWrittenError:
    """The script uses what it has kept of an earlier batch."""
    return StateWrittenError(
        Finding.refusal(
            "DPF034",
            f"the loss, or the model, takes what the loop has kept of an earlier batch{_at(line)}.",
            "it holds values of samples without noise (a queue of features, a running mean, a hidden state), and moves later "
            "steps by more than the clip norm.",
            f"compute it from the parameters, from public data, or within one batch and sample. {NOTHING_RELEASED}",
            path="training_step",
        )
    )


def reaches_model(by: str, model: str) -> CoupledModelError:
    """The model is told something of the batch beside its arguments."""
    return CoupledModelError(
        Finding.refusal(
            "DPF041",
            f"the loop has computed something from the batch, and it reaches {model} beside the samples: {by}.",
            "what the model makes of one sample then depends on the others, so clipping per sample bounds nothing.",
            "give it to the model as an argument with a row for every sample, or use a constant that does not come from the "
            f"batch. {NOTHING_RELEASED}",
            path="module",
        )
    )


def written_by_hand(model: str, line: str) -> MisuseError:
    """Parameters or buffers are written to with values of a batch."""
    return MisuseError(
        f"parameters or buffers of {model} were about to be written to with values that the loop has computed from a batch"
        f"{_at(line)}.",
        "They would leave without noise.",
        "Change parameters by optimizer.step() alone; weight decay, clamping and averaging by hand need no values of a batch.",
        path="module",
    )


def moved_outside(shape: tuple[int, ...]) -> MisuseError:
    """A parameter that learns from the private loss was changed by hand."""
    return MisuseError(
        f"a parameter of shape {shape} that is not in the private model gets gradient from the private loss, and has changed "
        "since the last step.",
        "It was moved by gradients of single samples without clipping and noise.",
        "Make it a part of the model that is passed to make_private_safe, and its parameters a group of the private optimizer; "
        "or freeze it with requires_grad_(False).",
        path="parameters",
    )


def setting_follows(name: str) -> MisuseError:
    """A setting of the optimizer is computed from a batch."""
    return MisuseError(
        f"optimizer: `{name}` follows a number that the loop reads from its batches (a loss, a norm, a count).",
        "The step is scaled by values of samples without noise, so it tells more than the noise covers.",
        f"Set `{name}` from the number of the step, or from data that are public. {NOTHING_RELEASED}",
        path="optimizer",
    )


def learns_outside(shape: tuple[int, ...], optimizer: str) -> MisuseError:
    """An optimizer steps on parameters that learn from the private loss."""
    return MisuseError(
        f"optimizer: {optimizer}.step() was called over a parameter of shape {shape} that is not in the private model and gets "
        "gradient from the private loss (a criterion with parameters of its own, a head, a second network on real data).",
        "It would be moved by gradients of single samples without clipping and noise.",
        "Make it a part of the model that is passed to make_private_safe, and its parameters a group of the private optimizer; "
        "or freeze it with requires_grad_(False).",
        path="parameters",
    )


def not_followed(model: str, why: str) -> str:
    """What is warned about once, or refused with ``strict=True``."""
    return (
        f"the loop's loss could not be followed to the outputs of {model}: {why}. Whether it couples the samples of a batch "
        "(batch Dice, class weights with mean, ignore_index) is not checked, and the guarantee rests on it."
    )


NO_GRADIENT_YET = (
    "the loop reads p.grad of a private parameter between backward() and optimizer.step() (to log gradient norms, or in "
    "clip_grad_norm_ or clip_grad_value_), where it is None.",
    "The sum over the batch is made in step(), of gradients that are clipped per sample, and has noise.",
    "Read p.grad after step(); max_grad_norm of make_private_safe takes the place of clip_grad_norm_, which does nothing here.",
)
"""Fact, why and help."""

WAY_OUT = "Pass criterion= or training_step= to make_private_safe."


def _at(line: str) -> str:
    return f" ({line})" if line else ""


def argument_name(path: pytree.Path) -> str:
    """An argument of a call, for messages."""
    kind, *rest = path
    if kind == 0:
        return f"argument {rest[0]}" if rest else "its arguments"
    return f"argument `{rest[0]}`" if rest else "its arguments"

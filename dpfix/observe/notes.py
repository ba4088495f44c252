"""Findings that only the probe can show."""

from __future__ import annotations

from torch import nn
from torch.utils.data import DataLoader

from dpfix.observe.double_activation import Repeated
from dpfix.observe.record import StepRecord
from dpfix.observe.training_step import TrainingStep
from dpfix.plan import Plan
from dpfix.report.finding import Finding, Fixability, Severity
from dpfix.sampling.rate import draws_with_replacement
from dpfix.scan.options import Options


def frozen(module: nn.Module, record: StepRecord) -> Finding:
    """The finding about parameters that no gradient reaches.

    Args:
        module: the model.
        record: what the probe showed; at least one parameter is unused.

    Returns:
        The finding.
    """
    count = len(record.unused)
    shown = ", ".join(f"`{n}`" for n in record.unused[:3]) + (", ..." if count > 3 else "")
    return Finding(
        "DPF017",
        Severity.BLOCKS_TRAINING,
        Fixability.EXACT,
        f"no gradient reaches {count} trainable parameter(s) of {type(module).__name__}: {shown}.",
        "noise would be all they ever receive; Opacus stops with 'Per sample gradient is not initialized'.",
        "frozen (requires_grad=False) while training privately; to_standard_module() gives it back",
        "if they should be trained, look for a detach, a weight of 0 in the loss, or a missing training_step.",
        record.unused[0],
    )


def observed(module: nn.Module, step: TrainingStep, record: StepRecord) -> list[Finding]:
    """What the probe showed and changed nothing about.

    Args:
        module: the model.
        step: from batch to loss.
        record: what the probe showed.

    Returns:
        Advice.
    """
    notes = [twice(module, pair) for pair in record.together.repeated]
    if not step.loss_known:
        notes.append(
            _advice(
                "DPF020",
                f"the loop's loss is not known ({step.origin}).",
                "whether it couples the samples (batch Dice, class weights with mean, ignore_index) is checked on the first "
                "real steps, in backward().",
                help="pass criterion= or training_step= to have it checked before training, on harder samples too.",
                path="training_step",
            )
        )
    if record.constant_writes:
        notes.append(
            _advice(
                "DPF021",
                f"forward writes `{record.constant_writes[0]}` ({len(record.constant_writes)} piece(s) of state).",
                "what is written was the same for different samples, so nothing leaks.",
                path=record.constant_writes[0],
            )
        )
    if record.in_place:
        notes.append(
            _advice(
                "DPF023",
                f"forward overwrites the output of a layer: {record.in_place[0]} ({len(record.in_place)} such place(s)).",
                "Opacus's hooks cannot follow it; an engine of dpfix can.",
                help="write x = x + y instead of x += y if you want Opacus's hooks to be considered.",
                path=record.in_place[0].module,
            )
        )
    if record.counts:
        notes.append(
            _advice(
                "DPF024",
                f"samples enter {type(module).__name__} as different numbers of rows ({min(record.counts)} to "
                f"{max(record.counts)} in the probe).",
                "the rows of a sample are clipped together, and counted once: the privacy unit is the sample.",
                path="data_loader",
            )
        )
    elif record.rows_per_sample > 1:
        notes.append(
            _advice(
                "DPF024",
                f"every sample enters {type(module).__name__} as {record.rows_per_sample} rows.",
                "the rows of a sample are clipped together, and counted once: the privacy unit is the sample.",
                path="data_loader",
            )
        )
    return notes


def regions(plan: Plan, samples: int) -> list[Finding]:
    """The findings about module calls that run without a graph.

    Args:
        plan: the plan.
        samples: size of the probe on which the savings were measured.

    Returns:
        One finding per call.
    """
    return [
        Finding(
            "DPF026",
            Severity.ADVICE,
            Fixability.EXACT,
            f"no gradient comes back to the call of `{r.site.path or 'the model'}`"
            + (f" at {r.site.place}" if r.site.place else f" (call {r.site.root + 1} of the step)")
            + (f": {r.cut}." if r.cut else "."),
            "its graph would be built and never walked; Opacus's hooks lose the pairing of activations and gradients.",
            f"runs without a graph: saves {r.saved_bytes / 1e6:.3g} MB and {r.saved_seconds * 1e3:.2g} ms on {samples} samples",
            "the same by hand: `with torch.no_grad():` around that call. no_grad_regions=False leaves it alone.",
            r.site.path,
        )
        for r in plan.no_grad_regions
    ]


def scratch(record: StepRecord) -> list[Finding]:
    """The finding about attributes that hold something of the last batch.

    Args:
        record: what the probe showed.

    Returns:
        One finding, or none.
    """
    if not record.scratch:
        return []
    name = ".".join(part for part in record.scratch[0] if part)
    return [
        Finding(
            "DPF025",
            Severity.BREAKS_GUARANTEE,
            Fixability.EXACT,
            f"forward keeps `{name}` until its next call ({len(record.scratch)} such attribute(s)).",
            "something of the last batch would leave the training, without noise, with the model object.",
            "put back to what it was before the call after every step; every forward pass sets it anew",
            "return what the loop needs from forward instead.",
            name,
        )
    ]


def twice(module: nn.Module, pair: Repeated) -> Finding:
    """The finding about an activation of probabilities.

    Args:
        module: the model.
        pair: what made the probabilities, and what took them for logits.

    Returns:
        It blocks training if the second one is in the loss; inside the model it may be meant and is advice.
    """
    in_loss = pair.second.module is None
    fact = f"{pair.second} is applied to the probabilities that {pair.first} has made ({type(module).__name__})."
    return Finding(
        "DPF030",
        Severity.BLOCKS_TRAINING if in_loss else Severity.ADVICE,
        Fixability.NOTHING,
        fact[0].upper() + fact[1:],
        "an activation of probabilities is nearly flat (a sigmoid of them lies in [0.5, 0.7311]): gradients shrink, and "
        "noise of the same size drowns them.",
        help="apply one of the two: let the model return logits, or take a loss that expects probabilities (BCELoss, "
        "NLLLoss of a log, sigmoid=False and softmax=False in MONAI's losses)."
        if in_loss
        else "if it is not meant, take one of the two out.",
        path=(pair.first.module or "") if in_loss else (pair.second.module or ""),
    )


def replaced_sampler(loader: DataLoader, options: Options) -> list[Finding]:
    """Whether Poisson sampling changes how the user's loader draws.

    Args:
        loader: the user's loader.
        options: what was asked for.

    Returns:
        Advice if it drew with replacement.
    """
    if not (options.poisson_sampling and draws_with_replacement(loader)):
        return []
    return [
        _advice(
            "DPF022",
            "data_loader draws with replacement; the private loader draws Poisson batches instead.",
            "the accountant assumes that every sample enters a batch independently, at most once.",
            path="data_loader",
        )
    ]


def _advice(code: str, fact: str, why: str, help: str = "", path: str = "") -> Finding:
    return Finding(code, Severity.ADVICE, Fixability.NOTHING, fact, why, help=help, path=path)

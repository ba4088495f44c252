"""Running the training step on the probe and writing down what really happens.

The step is run once on every sample alone and once on all of them together, on the plain (repaired) model. The
singles are at the same time the batch-of-one reference that the audit compares every engine with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any

from torch import nn

from dpfix.errors import CoupledLossError, CoupledModelError, TrainingStepError
from dpfix.instrument.fixed_randomness import DRAWS, Draw, FixedRandomness
from dpfix.instrument.module_state import Key, put_back, traceless
from dpfix.instrument.own_generators import drawing
from dpfix.instrument.source import describe_module
from dpfix.layout.calls import LayerLayout
from dpfix.layout.infer import ValuesNeededError, layout_of_calls, layout_of_layers
from dpfix.layout.row_count import row_counts
from dpfix.observe.failures import described_failures
from dpfix.observe.one_step import draws_for_each, run_like, run_step
from dpfix.observe.padded import as_in_batch
from dpfix.observe.probe import Probe
from dpfix.observe.record import ModuleCall, Run, StepRecord
from dpfix.observe.recorder import RecordedCall, StepLog
from dpfix.observe.training_step import Subject
from dpfix.observe.writes import constant_and_dependent, dotted, overwritten_by_every_step
from dpfix.report.finding import Finding, Fixability, Severity


def observe(subject: Subject, probe: Probe, known: StepRecord | None = None, draw: Draw = DRAWS[0]) -> StepRecord:
    """Run the step on every sample alone and on all together.

    Args:
        known: what the ordinary probe showed, if this one was made from it: samples that are the same are not run again,
            and functions and layers are not written down again.
        draw: what is drawn; another one than that of ``known`` runs all samples again.

    Returns:
        What was seen. The model, every generator and every gradient are afterwards as before, also if the step fails.
    """
    module, first = subject.module, known is None
    log = StepLog(details=first, layers=first, one_row=len(probe))
    trainable = list(subject.trained())
    with traceless(module) as before:
        alone: list[Run] = []
        for number, batch in enumerate(probe.singles):
            same_as = probe.unchanged[number] if probe.unchanged and draw is DRAWS[0] else None
            if known is not None and same_as is not None and not known.together.drew_outside:
                run = known.alone[same_as]
                gradients, norms = ({name: of[name] for name in trainable} for of in (run.gradients, run.norms))
                alone.append(replace(run, gradients=gradients, norms=norms))
                continue
            earlier = known.together if known is not None else alone[0] if alone else None
            with _batch_runs_too(subject, probe, before) as log_alone:
                log_alone.layers, log_alone.one_row = first, 1
                alone.append(run_like(earlier, subject, batch, before, log_alone, draw))
            if alone[-1].written:
                put_back(module, before)
        earlier = alone[0] if known is None else known.together
        together = run_like(earlier, subject, probe.batch, before, log, draw)
        put_back(module, before)
        draws = [draw] * len(alone)
        if draws_for_each(alone[0], together):
            draws = [replace(draw, goes_on=number > 0) for number in range(len(alone))]
            for number, batch in enumerate(probe.singles):
                alone[number] = run_step(subject, batch, before, StepLog(layers=first, one_row=1), draw=draws[number])
                put_back(module, before)
        used = together.used.union(*(run.used for run in alone))
        drew = together.drew or together.drew_outside or subject.generators
        if first and drew and not used >= set(trainable):
            used |= _used_by_chance(subject, probe, before)
        constant, dependent = constant_and_dependent([*alone, together])
        scratch = known.scratch if known else overwritten_by_every_step(subject, probe, before, alone[0], dependent)
        model_calls = [run.calls.get("", []) for run in (together, *alone)]
        counts = row_counts(model_calls[0], model_calls[1:])
        layers = known.layers if known else _layers(subject, probe, before, [*alone, together], counts, draws)
    calls, problem = layout_of_calls(model_calls[0], model_calls[1:], counts)
    return StepRecord(
        together=_root_only(together),
        alone=tuple(_root_only(run) for run in alone),
        calls=calls,
        layout_problem=problem,
        layers=layers,
        modules=_module_calls(log),
        unused=tuple(name for name in trainable if name not in used),
        functional=dict(log.functional),
        elsewhere=tuple((name, tuple(paths)) for name, paths in log.elsewhere.items()),
        several=_several(module, log),
        cuts={site: frozenset(numbers) for site, numbers in log.detached.items()},
        in_place=tuple(log.in_place),
        needs_workarounds=log.needs_workarounds,
        constant_writes=tuple(map(dotted, constant)),
        sample_writes=tuple(dotted(key) for key in dependent if key not in scratch),
        scratch=scratch,
        counts=counts,
    )


def _layers(
    subject: Subject,
    probe: Probe,
    before: dict[Key, Any],
    runs: Sequence[Run],
    counts: tuple[int, ...],
    draws: Sequence[Draw],
) -> tuple[LayerLayout, ...]:
    """How the calls of the layers carry the samples; where shapes do not tell it, the step is run again for the values.

    Args:
        runs: the step on every sample alone, and on all together.
        counts: rows of every sample, where these are not the same for all.
        draws: what is drawn for every sample alone.

    Returns:
        The layouts.
    """

    def calls(batch: Any, draw: Draw = DRAWS[0]) -> Mapping[str, list[RecordedCall]]:
        try:
            return run_step(subject, batch, before, StepLog(layers=True), draw=draw).calls
        finally:
            put_back(subject.module, before)

    padded: list[Mapping[str, list[RecordedCall]]] = []
    with suppress(TrainingStepError):  # a model that cannot work on padding alone
        padded = [calls(batch) for batch in as_in_batch(probe)]
    with suppress(ValuesNeededError):
        return layout_of_layers(runs[-1].calls, padded or [run.calls for run in runs[:-1]], counts)
    alone = padded or [calls(batch, draw) for batch, draw in zip(probe.singles, draws, strict=True)]
    return layout_of_layers(calls(probe.batch), alone, counts)


@contextmanager
def _batch_runs_too(subject: Subject, probe: Probe, before: dict[Key, Any]) -> Iterator[StepLog]:
    """A model that runs on a batch, but not on the sample that runs inside, is one that needs the other samples."""
    log = StepLog()
    try:
        yield log
    except TrainingStepError as error:
        put_back(subject.module, before)
        run_step(subject, probe.batch, before)
        put_back(subject.module, before)
        if log.failed is None:
            raise _needs_others(subject, probe, error) from error
        raise CoupledModelError(
            Finding.refusal(
                "DPF013",
                f"{describe_module(subject.module, log.failed)} mixes the samples of a batch: it works on "
                f"{len(probe)} samples, but not on one alone: {error.__cause__}.",
                "a layer that needs several samples mixes them (a normalisation over the batch), so clipping per sample "
                "bounds nothing.",
                "use a normalisation per sample (GroupNorm, LayerNorm) instead; a layer in eval() may also help.",
                path=log.failed,
            )
        ) from error


def _needs_others(subject: Subject, probe: Probe, error: TrainingStepError) -> CoupledLossError:
    """What the step makes of the model's output fails for one sample, where there are others it does not."""
    cause = error.__cause__
    return CoupledLossError(
        Finding.refusal(
            "DPF014",
            f"the loss works on {len(probe)} samples, but not on one alone: {type(cause).__name__}: {cause} "
            f"({subject.step.origin}).",
            "what counts (positives, valid elements) is averaged over the batch, and a sample alone may hold none of it; its "
            "share of the loss then depends on the other samples.",
            "average inside each sample, with max(count, 1) as the divisor, then over the samples; "
            "dpfix.PerSampleLoss(criterion) does so, and a sample in which nothing counts contributes 0.",
            path="training_step" if subject.step.origin.startswith("training_step") else "criterion",
        )
    )


def _root_only(run: Run) -> Run:
    """Activations of the layers are not needed once their layout is known."""
    return replace(run, calls={"": list(run.calls.get("", []))})


def _used_by_chance(subject: Subject, probe: Probe, before: dict[Key, Any]) -> frozenset[str]:
    """Parameters reached under other draws: a layer that is dropped at random is not unused."""
    used: set[str] = set()
    parameters = subject.trained()
    for draw in (None, None, *DRAWS[1:3]):
        for p in parameters.values():
            p.grad = None
        with ExitStack() as stack:
            stack.enter_context(suppress(TrainingStepError))  # a draw that drops every layer leaves no loss
            if draw is not None:
                stack.enter_context(FixedRandomness(draw=draw))
                stack.enter_context(drawing(subject.generators, draw))
            stack.enter_context(described_failures(subject.step))
            subject.loss(probe.batch).backward()
        used |= {name for name, p in parameters.items() if p.grad is not None}
        put_back(subject.module, before)
    return frozenset(used)


def _module_calls(log: StepLog) -> tuple[ModuleCall, ...]:
    count: dict[str, int] = {}
    out = []
    for number, call in enumerate(log.order):
        earlier = count.get(call.path, 0)
        reached = number in log.reached
        times = (call.site, call.carries_graph, call.entered, call.left)
        out.append(ModuleCall(call.path, earlier, call.shapes, reached, *times))
        count[call.path] = earlier + 1
    return tuple(out)


def _several(module: nn.Module, log: StepLog) -> tuple[str, ...]:
    names: dict[int, list[str]] = {}
    for name, p in module.named_parameters(remove_duplicate=False):
        if p.requires_grad:
            names.setdefault(id(p), []).append(name)
    return tuple(
        found[0]
        for found in names.values()
        if len(found) > 1 or any(len(log.calls.get(name.rpartition(".")[0], ())) > 1 for name in found)
    )


def frozen(module: nn.Module, record: StepRecord) -> Finding:
    """The finding about parameters that no gradient reaches, of which there is at least one."""
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

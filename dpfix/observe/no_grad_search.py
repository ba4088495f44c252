"""Finding the module calls whose graph nobody walks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace

from torch import nn

from dpfix.engines.no_grad_regions import NoGradRegions, applied, line_of
from dpfix.errors import DPFixError
from dpfix.instrument.gradients import Gradients, relative_error
from dpfix.instrument.module_state import put_back, traceless
from dpfix.observe.probe import Probe
from dpfix.observe.record import ModuleCall, Run, StepRecord
from dpfix.observe.run import run_step
from dpfix.observe.training_step import TrainingStep
from dpfix.plan import Region

EXACT = 1e-6
"""Relative difference of the gradients with and without a region that is rounding."""


def find(
    module: nn.Module, step: TrainingStep, probe: Probe, record: StepRecord, unused: Sequence[str]
) -> tuple[Region, ...]:
    """The outermost module calls that no gradient comes back to, as far as a step without their graph is the same step.

    Args:
        module: the repaired model; parameters that no gradient reaches are already frozen.
        step: from batch to loss.
        probe: the samples.
        record: what the probe showed.
        unused: parameters that no gradient reaches, frozen by now.

    Returns:
        The regions, with what each of them saves on the probe.
    """
    kept: tuple[Region, ...] = ()
    candidates = _candidates(module, record)
    if not candidates:
        return ()
    wanted = {n: g for n, g in record.together.gradients.items() if n not in set(unused)}
    with traceless(module) as before:

        def run(cutting: bool, regions: Iterable[Region]) -> tuple[Run, NoGradRegions]:
            with applied(module, regions, cutting=cutting) as at_work:
                out = run_step(module, step, probe.batch, before)
            put_back(module, before)
            return out, at_work

        for region in candidates:
            with suppress(DPFixError):  # a step that fails without the graph keeps it
                without, at_work = run(cutting=True, regions=(*kept, region))
                if not at_work.tripped and _same_step(without, record.together.loss, wanted):
                    kept = (*kept, region)
        if not kept:
            return ()
        _, plain = run(cutting=False, regions=kept)
        _, cut = run(cutting=True, regions=kept)
    return tuple(
        replace(r, saved_bytes=plain.bytes.get(r, 0), saved_seconds=max(0.0, plain.seconds[r] - cut.seconds[r]))
        for r in kept
    )


def _candidates(module: nn.Module, record: StepRecord) -> list[Region]:
    cut = [c for c in record.modules if c.site is not None and c.carries_graph and not c.reached]
    outermost = [c for c in cut if not any(_inside(c, other) for other in cut)]
    regions = []
    for c in outermost:
        if any(p.requires_grad for p in module.get_submodule(c.path).parameters()):
            alike = [o for o in record.modules if o.site is not None and line_of(o.site) == line_of(c.site)]
            regions.append(Region(c.site, len(alike), _cut_by(c, record)))  # type: ignore[arg-type]
    return regions


def _inside(call: ModuleCall, other: ModuleCall) -> bool:
    return call is not other and other.entered < call.entered and call.left <= other.left


def _cut_by(call: ModuleCall, record: StepRecord) -> str:
    """The detach behind a call, if one was seen."""
    for site, numbers in record.cuts.items():
        if any(record.modules[n] is call or _inside(record.modules[n], call) for n in numbers):
            return str(site)
    return ""


def _same_step(run: Run, loss: float, gradients: Gradients) -> bool:
    return abs(run.loss - loss) <= EXACT * abs(loss) and relative_error(run.gradients, gradients)[0] <= EXACT

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
from dpfix.observe.one_step import run_step
from dpfix.observe.probe import Probe
from dpfix.observe.record import ModuleCall, Run, StepRecord
from dpfix.observe.training_step import Subject
from dpfix.plan import Region
from dpfix.report.finding import Finding, Fixability, Severity

EXACT = 1e-6
"""Relative difference of the gradients with and without a region that is rounding."""


def find(subject: Subject, probe: Probe, record: StepRecord, unused: Sequence[str]) -> tuple[Region, ...]:
    """The outermost module calls that no gradient comes back to, as far as a step without their graph is the same step.

    Args:
        subject: the model and its training step; parameters that no gradient reaches are already frozen.
        unused: parameters that no gradient reaches, frozen by now.

    Returns:
        The regions, with what each of them saves on the probe.
    """
    module = subject.module
    kept: tuple[Region, ...] = ()
    candidates = _candidates(module, record)
    if not candidates:
        return ()
    wanted = {n: g for n, g in record.together.gradients.items() if n not in set(unused)}
    with traceless(module) as before:

        def run(cutting: bool, regions: Iterable[Region]) -> tuple[Run, NoGradRegions]:
            with applied(module, regions, cutting=cutting) as at_work:
                out = run_step(subject, probe.batch, before)
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


def finding(region: Region, samples: int) -> Finding:
    """The finding about a module call that runs without a graph, measured on a probe of some samples."""
    site = region.site
    return Finding(
        "DPF026",
        Severity.ADVICE,
        Fixability.EXACT,
        f"no gradient comes back to the call of `{site.path or 'the model'}`"
        + (f" at {site.line}" if site.line else f" (call {site.root + 1} of the step)")
        + (f": {region.cut}." if region.cut else "."),
        "its graph would be built and never walked; Opacus's hooks lose the pairing of activations and gradients.",
        f"runs without a graph: saves {region.saved_bytes / 1e6:.3g} MB and {region.saved_seconds * 1e3:.2g} ms on "
        f"{samples} samples",
        "the same by hand: `with torch.no_grad():` around that call. no_grad_regions=False leaves it alone.",
        site.path,
    )

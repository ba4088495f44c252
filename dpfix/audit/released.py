"""What an engine would release for a probe, by one backward pass and the optimizer's own clipping."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from opacus.optimizers import DPOptimizer
from torch import nn

from dpfix.audit.reference import Trial
from dpfix.engines.base import Engine, Handle, drop_sample_gradients
from dpfix.engines.no_grad_regions import NoGradRegions
from dpfix.errors import ModelError
from dpfix.instrument.fixed_randomness import DRAWS, FixedRandomness
from dpfix.instrument.grad_watch import GradWatch
from dpfix.instrument.gradients import Gradients
from dpfix.instrument.module_state import traceless
from dpfix.instrument.own_generators import drawing
from dpfix.instrument.rng import generator_states
from dpfix.observe.probe import Probe
from dpfix.observe.training_step import Subject
from dpfix.plan import Plan


def released_sums(
    engine: Engine,
    subject: Subject,
    trial: Trial,
    plan: Plan,
    clip_norms: tuple[float, ...],
    kept: Callable[[Gradients], Gradients] = dict,
) -> list[Gradients]:
    """The clipped sums that the optimizer would release for a probe, one per clip norm.

    Args:
        trial: the probe. If the plain step draws anything random on it, that has to be fixed by a look at every operation; if
            it does not, this is done only where the engine draws nevertheless.
        kept: what is kept of a sum; nothing else of it is there when the next one is made.

    Returns:
        For every clip norm what is kept of its sum, by parameter name. The model is afterwards as before.

    Raises:
        ModelError: gradient reached a parameter past the engine, or rows are missing.
    """
    take = partial(clipped_sums, clip_norms=clip_norms, plan=plan, kept=kept)
    if not trial.wanted.drew:
        with suppress(_DrewError):
            return _released(engine, subject, trial.samples, plan, take, fixed=False)
    return _released(engine, subject, trial.samples, plan, take, fixed=True)


class _DrewError(Exception):
    """Something random was drawn where nothing was expected to be; caught inside this file."""


def _released(
    engine: Engine, subject: Subject, probe: Probe, plan: Plan, take: Callable[..., list[Gradients]], *, fixed: bool
) -> list[Gradients]:
    module, parameters = subject.module, subject.trained()
    with traceless(module):
        handle = engine.attach(module, plan)
        handle.counts = lambda: probe.counts(plan.row_counter)
        regions = NoGradRegions(module, plan.no_grad_regions)
        watch = GradWatch(parameters)
        try:
            DRAWS[0].seed_outside()
            generators = generator_states()
            mode = FixedRandomness()
            with drawing(subject.generators, DRAWS[0]), mode if fixed else mode.outside:
                subject.step.loss(handle.model, probe.batch).backward()
            if not fixed and not all(map(torch.equal, generators, generator_states())):
                raise _DrewError
            if regions.tripped:
                path = regions.tripped[0].site.path
                raise ModelError(f"gradient reached `{path}`, which runs without a graph", path=path)
            counts = handle.announce(list(parameters.values()))
            if engine.owns_gradients and watch.arrived:
                raise ModelError(
                    f"gradient reached parameter `{watch.arrived[0]}` past the model's forward:",
                    "a penalty on weights in the loss, or a part of the model called directly in training_step.",
                    "Use the optimizer's weight_decay for penalties, and call the model as a whole",
                    path=watch.arrived[0],
                )
            if counts != [len(probe)]:
                raise ModelError(f"per-sample gradients for {counts} rows instead of {len(probe)} samples")
            return take(handle, parameters)
        finally:
            watch.remove()
            regions.detach()
            handle.detach()
            drop_sample_gradients(parameters.values())


def clipped_sums(
    handle: Handle,
    parameters: dict[str, nn.Parameter],
    clip_norms: tuple[float, ...],
    plan: Plan,
    kept: Callable[[Gradients], Gradients] = dict,
) -> list[Gradients]:
    """Let the engine clip, or Opacus's optimizer where per-sample gradients were collected, once per clip norm.

    Args:
        kept: what is kept of a sum.

    Returns:
        For every clip norm what is kept of the clipped sum, by parameter name.
    """
    if handle.clips:
        return [kept(_clipped_by_engine(handle, parameters, clip_norm)) for clip_norm in clip_norms]
    samples: dict[str, Any] = {n: p.grad_sample for n, p in parameters.items()}  # type: ignore[attr-defined]
    return [kept(_clipped_by_optimizer(samples, parameters, clip_norm, plan)) for clip_norm in clip_norms]


def _clipped_by_engine(handle: Handle, parameters: dict[str, nn.Parameter], clip_norm: float) -> Gradients:
    for p in parameters.values():
        p.summed_grad = None  # type: ignore[attr-defined]
    handle.clip_and_accumulate(list(parameters.values()), clip_norm)
    return {name: p.summed_grad.detach() for name, p in parameters.items()}  # type: ignore[attr-defined]


def _clipped_by_optimizer(
    samples: dict[str, Any], parameters: dict[str, nn.Parameter], clip_norm: float, plan: Plan
) -> Gradients:
    """Let Opacus's optimizer clip what the engine left."""
    scheme = plan.clipping
    if not scheme.plain:  # what the private optimizer does then
        sums = scheme.clipped_sums(list(samples), [g.detach() for g in samples.values()], clip_norm)
        return dict(zip(samples, sums, strict=True))
    optimizer = DPOptimizer(
        torch.optim.SGD(parameters.values(), lr=0.0),
        noise_multiplier=0.0,
        max_grad_norm=clip_norm,
        expected_batch_size=1,
        loss_reduction=plan.loss_reduction,
    )
    for name, p in parameters.items():
        p.grad_sample = samples[name].detach()  # type: ignore[attr-defined]
    optimizer.clip_and_accumulate()
    return {name: p.summed_grad.detach() for name, p in parameters.items()}  # type: ignore[attr-defined]

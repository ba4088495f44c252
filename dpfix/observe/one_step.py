"""One training step on the plain model: forward, backward, and what it wrote, drew and called."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dpfix.instrument.fixed_randomness import DRAWS, Draw, FixedRandomness, outside_states
from dpfix.instrument.gradients import gap, norms_of, sketched
from dpfix.instrument.module_state import Key, put_back, traceless, written
from dpfix.instrument.own_generators import drawing
from dpfix.instrument.rng import generator_states
from dpfix.observe import double_activation
from dpfix.observe.failures import described_failures
from dpfix.observe.probe import Probe
from dpfix.observe.record import Run
from dpfix.observe.recorder import StepLog, recorder
from dpfix.observe.training_step import Subject


def run_step(
    subject: Subject,
    batch: Any,
    before: dict[Key, Any],
    log: StepLog | None = None,
    *,
    watched: bool = True,
    draw: Draw = DRAWS[0],
) -> Run:
    """One forward and backward pass on the plain model with fixed randomness.

    Args:
        before: snapshot of the model's state, to tell what was written.
        log: where it is written down, if that is wanted.
        watched: whether to fix torch's randomness, by a look at every operation; if not, the step must draw nothing.
        draw: what is drawn.

    Returns:
        What happened.
    """
    log = StepLog() if log is None else log
    parameters = subject.trained()
    for p in parameters.values():
        p.grad = None
    mode = FixedRandomness(log.stack, draw)
    draw.seed_outside()
    outside = outside_states()
    with (
        drawing(subject.generators, draw),
        recorder(subject.module, log),
        mode if watched else mode.outside,
        described_failures(subject.step),
    ):
        loss = subject.loss(batch)
        repeated = double_activation.repeated(loss, log.activations) if log.details else ()
        loss.backward()
    outside_after = outside_states()
    gradients = {n: _dense(p) for n, p in parameters.items()}
    used = frozenset(n for n, p in parameters.items() if p.grad is not None)
    for p in parameters.values():
        p.grad = None
    return Run(
        float(loss.detach()),
        sketched(gradients),
        norms_of(gradients),
        used,
        log.calls,
        written(subject.module, before),
        frozenset().union(*mode.random_ops.values()) if mode.random_ops else frozenset(),
        mode.low_precision,
        bool(mode.random_ops),
        repeated,
        mode.drawn,
        mode.decides,
        outside_after if outside_after != outside else 0,
        mode.outside.drawn,
    )


def _dense(p: nn.Parameter) -> torch.Tensor:
    if p.grad is None:
        return torch.zeros_like(p, memory_format=torch.contiguous_format)
    grad = p.grad.detach()
    return grad.to_dense() if grad.is_sparse else grad


def run_like(
    earlier: Run | None,
    subject: Subject,
    batch: Any,
    before: dict[Key, Any],
    log: StepLog,
    draw: Draw = DRAWS[0],
) -> Run:
    """The step on other samples; where an earlier run drew nothing, no operation is watched unless this one draws.

    Returns:
        What happened.
    """
    if earlier is not None and not (earlier.drew or earlier.low_precision or draw.goes_on):
        generators = generator_states()
        run = run_step(subject, batch, before, log, watched=False, draw=draw)
        if all(map(torch.equal, generators, generator_states())):
            return run
        put_back(subject.module, before)
        log.forget()
    return run_step(subject, batch, before, log, draw=draw)


def alone_and_together(
    subject: Subject, probe: Probe, earlier: Run | None = None, draw: Draw = DRAWS[0]
) -> tuple[tuple[Run, ...], Run]:
    """Run the step on every sample alone and on all together, without a look at what happens inside.

    Args:
        earlier: a run of the same step, to tell what has to be watched.
        draw: what is drawn.

    Returns:
        One run per sample, and that on all. The model is afterwards as before.
    """
    runs: list[Run] = []
    with traceless(subject.module) as before:
        for batch in (*probe.singles, probe.batch):
            runs.append(run_like(earlier or runs[0] if runs else earlier, subject, batch, before, StepLog(), draw))
            put_back(subject.module, before)
        *alone, together = runs
        if draws_for_each(alone[0], together):
            for number, batch in enumerate(probe.singles):
                alone[number] = run_step(subject, batch, before, draw=replace(draw, goes_on=number > 0))
                put_back(subject.module, before)
    return tuple(alone), together


def draws_for_each(single: Run, together: Run) -> bool:
    """Whether the step draws from Python's or NumPy's generator as often as there are samples, in a way that cannot be fixed.

    The samples alone then go on drawing one after the other, as the batch does.

    Returns:
        Whether it does.
    """
    return together.outside != single.outside


def decided_by_rounding(subject: Subject, probe: Probe, tolerance: float) -> bool:
    """Whether a sample's gradient changes when the parameters move by as little as rounding does.

    A constant sample behind several normalisations is such a case: each divides by nearly nothing. Its gradient in a
    batch and alone may then differ without any coupling.

    Returns:
        True if that is so for any of the samples.
    """
    generator = torch.Generator().manual_seed(0)
    with traceless(subject.module) as before:
        for batch in probe.singles:
            still = run_step(subject, batch, before)
            with torch.no_grad():
                for p in subject.module.parameters():
                    p.mul_(1 + 1e-6 * torch.randn(p.shape, generator=generator).to(p))
            moved = run_step(subject, batch, before).gradients
            put_back(subject.module, before)
            change = math.hypot(*(gap(g, moved[n]) for n, g in still.gradients.items()))
            if not change <= tolerance * math.hypot(*still.norms.values()):
                return True
    return False

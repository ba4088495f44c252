"""One training step on the plain model: forward, backward, and what it wrote, drew and called."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from dpfix.instrument.fixed_randomness import FixedRandomness
from dpfix.instrument.module_state import Key, put_back, traceless, written
from dpfix.instrument.rng import generator_states
from dpfix.observe import double_activation
from dpfix.observe.failures import described_failures
from dpfix.observe.probe import Probe
from dpfix.observe.record import Run
from dpfix.observe.recorder import StepLog, recorder
from dpfix.observe.training_step import Subject


def run_step(
    subject: Subject, batch: Any, before: dict[Key, Any], log: StepLog | None = None, *, watched: bool = True
) -> Run:
    """One forward and backward pass on the plain model with fixed randomness.

    Args:
        before: snapshot of the model's state, to tell what was written.
        log: where it is written down, if that is wanted.
        watched: whether to fix randomness, by a look at every operation; if not, the step must draw nothing.

    Returns:
        What happened.
    """
    log = StepLog() if log is None else log
    parameters = subject.trained()
    for p in parameters.values():
        p.grad = None
    mode = FixedRandomness(log.stack)
    with recorder(subject.module, log), mode if watched else nullcontext(), described_failures(subject.step):
        loss = subject.loss(batch)
        repeated = double_activation.repeated(loss, log.activations) if log.details else ()
        loss.backward()
    gradients = {n: _dense(p) for n, p in parameters.items()}
    used = frozenset(n for n, p in parameters.items() if p.grad is not None)
    for p in parameters.values():
        p.grad = None
    return Run(
        float(loss.detach()),
        gradients,
        used,
        log.calls,
        written(subject.module, before),
        frozenset().union(*mode.random_ops.values()) if mode.random_ops else frozenset(),
        mode.low_precision,
        bool(mode.random_ops),
        repeated,
    )


def _dense(p: nn.Parameter) -> torch.Tensor:
    if p.grad is None:
        return torch.zeros_like(p, memory_format=torch.contiguous_format)
    grad = p.grad.detach()
    return grad.to_dense() if grad.is_sparse else grad


def run_like(earlier: Run | None, subject: Subject, batch: Any, before: dict[Key, Any], log: StepLog) -> Run:
    """The step on other samples; where an earlier run drew nothing, no operation is watched unless this one draws.

    Returns:
        What happened.
    """
    if earlier is not None and not (earlier.drew or earlier.low_precision):
        generators = generator_states()
        run = run_step(subject, batch, before, log, watched=False)
        if all(map(torch.equal, generators, generator_states())):
            return run
        put_back(subject.module, before)
        log.forget()
    return run_step(subject, batch, before, log)


def one_by_one(subject: Subject, probe: Probe) -> tuple[Run, ...]:
    """Run the step on every sample alone, without a look at what happens inside.

    Returns:
        One run per sample. The model is afterwards as before.
    """
    runs: list[Run] = []
    with traceless(subject.module) as before:
        for batch in probe.singles:
            runs.append(run_like(runs[0] if runs else None, subject, batch, before, StepLog()))
            put_back(subject.module, before)
    return tuple(runs)


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
            still = run_step(subject, batch, before).gradients
            with torch.no_grad():
                for p in subject.module.parameters():
                    p.mul_(1 + 1e-6 * torch.randn(p.shape, generator=generator).to(p))
            moved = run_step(subject, batch, before).gradients
            put_back(subject.module, before)
            size = sum(float(g.double().square().sum()) for g in still.values()) ** 0.5
            change = sum(float((g - moved[n]).double().square().sum()) for n, g in still.items()) ** 0.5
            if not change <= tolerance * size:
                return True
    return False

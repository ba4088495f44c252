"""Comparing the book-keeping engine with a batch-of-one reference, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dpfix.engines.bookkeeping import Bookkeeping
from dpfix.observe.probe import Probe
from dpfix.observe.run import observe
from dpfix.observe.training_step import Subject, TrainingStep, surrogate_loss
from dpfix.plan import Plan

SAMPLES = 4
Case = tuple[Callable[[], nn.Module], Callable[[int], Tensor]]


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    return surrogate_loss(model(*batch))


STEP = TrainingStep(loss_of, "test", loss_known=True)


def floats(*shape: int) -> Callable[[int], Tensor]:
    return lambda n: torch.randn(n, *shape, dtype=torch.float64)


def ids(high: int, *shape: int) -> Callable[[int], Tensor]:
    return lambda n: torch.randint(0, high, (n, *shape))


def probe_of(make: Callable[[int], Any]) -> Probe:
    batch = make(SAMPLES)
    batch = batch if isinstance(batch, tuple) else (batch,)
    singles = tuple(tuple(t[i : i + 1] for t in batch) for i in range(SAMPLES))
    return Probe(batch, singles, lambda items: items, ())


def one_by_one(model: nn.Module, probe: Probe, step: TrainingStep = STEP) -> dict[str, Tensor]:
    """The gradients of single samples by parameter name, ``[samples, *parameter]`` each."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found: dict[str, list[Tensor]] = {n: [] for n in trained}
    for single in probe.singles:
        model.zero_grad()
        step.loss(model, single).backward()  # reentrant checkpoints know no other way
        for n, p in trained.items():
            found[n].append(torch.zeros_like(p) if p.grad is None else p.grad)
    model.zero_grad()
    return {n: torch.stack([g.to_dense() for g in of_each]) for n, of_each in found.items()}


def plan_for(model: nn.Module, probe: Probe, step: TrainingStep = STEP) -> tuple[Plan, Any]:
    record = observe(Subject(model, step), probe)
    assert not Bookkeeping().supports(model, record).reason
    return Plan(
        "bookkeeping",
        "no_op",
        record.calls,
        record.layers,
        record.elsewhere,
        help_vmap=record.needs_workarounds,
    ), record


def check(model: nn.Module, make: Callable[[int], Any], step: TrainingStep = STEP, bound: float = 1e-9) -> None:
    torch.manual_seed(1)
    model = model.double().train()
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.5)
    probe = probe_of(make)
    plan, record = plan_for(model, probe, step)
    names = {n: p for n, p in model.named_parameters() if p.requires_grad and n not in record.unused}
    wanted = one_by_one(model, probe, step)
    norms = torch.stack([g.reshape(SAMPLES, -1).square().sum(1) for g in wanted.values()]).sum(0).sqrt()
    handle = Bookkeeping().attach(model, plan)
    parameters = list(names.values())
    reached: list[Tensor] = []
    hooks = [p.register_post_accumulate_grad_hook(reached.append) for p in parameters]
    try:
        step.loss(model, probe.batch).backward()
        assert not reached, "autograd went to a parameter itself"
        assert handle.announce(parameters) == [SAMPLES]
        for clip_norm in (0.05 * norms.median(), norms.median(), 2 * norms.max()):
            for p in parameters:
                p.summed_grad = None
            handle.clip_and_accumulate(parameters, float(clip_norm))
            factors = (clip_norm / (norms + 1e-6)).clamp(max=1)
            for n, p in names.items():
                close(p.summed_grad, torch.einsum("i,i...", factors, wanted[n]), n, bound)
        assert handle.collect(parameters) == [SAMPLES]
        for n, p in names.items():
            close(p.grad_sample, wanted[n], n, bound)
            assert p.grad is None, f"autograd computed a gradient for {n}"
        handle.finish()
        step.loss(model, probe.singles[0]).backward()
        assert handle.collect(parameters) == [1]
        for n, p in names.items():
            close(p.grad_sample[0], wanted[n][0], f"{n} of a batch of one", bound)
    finally:
        handle.detach()
        for hook in hooks:
            hook.remove()
    assert not any("forward" in vars(m) for m in model.modules())


def close(found: Tensor, wanted: Tensor, name: str, bound: float) -> None:
    assert found.shape == wanted.shape, name
    error = float((found - wanted).norm() / wanted.norm().clamp(min=1e-12))
    assert error <= bound, f"{name}: relative error {error:.1e}"

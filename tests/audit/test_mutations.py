"""The audit of the audit: engines that are broken on purpose are caught, engines that are right never are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, event, given, settings
from opacus.grad_sample import GradSampleModule
from torch import Tensor, nn

from dpfix.engines import ENGINES
from dpfix.engines.per_sample.microbatch import Microbatch, MicrobatchHandle
from tests.audit.models import Example, models
from tests.audit.setups import Looked, labelled, look
from tests.cases import classify
from tests.reference import gradients_one_by_one, relative_error

OPACUS = {"hooks", "functorch"}
"""Opacus's own engines: they may be wrong, and then the audit has to say so."""


# ------------------------------------------------------------------ broken engines

Samples = dict[str, Tensor]


class BrokenEngine(Microbatch):
    """The engine of batches of one, with a fault."""

    def __init__(self, handle: type[MicrobatchHandle], **fault: Any) -> None:
        self.handle, self.fault = handle, fault

    def attach(self, module: nn.Module, plan: Any, prepared: Any = None) -> MicrobatchHandle:
        handle = self.handle(module, plan)
        vars(handle).update(self.fault)
        return handle


class Changed(MicrobatchHandle):
    """Per-sample gradients are right until they are handed over."""

    change: Callable[[Samples], None]

    def collect(self, parameters: list[nn.Parameter]) -> list[int]:
        counts = super().collect(parameters)
        names = {p: n for n, p in self._parameters.items()}
        samples = {names[p]: p.grad_sample for p in parameters}
        self.change(samples)
        for p in parameters:
            p.grad_sample = samples[names[p]]
        return counts


def changed(change: Callable[[Samples], None]) -> BrokenEngine:
    """An engine whose per-sample gradients are changed at the end."""
    return BrokenEngine(Changed, change=change)


def one_layer(name: str, change: Callable[[Tensor], Tensor]) -> BrokenEngine:
    """An engine in which one parameter's per-sample gradients ``[samples, ...]`` are wrong."""

    def change_one(samples: Samples) -> None:
        samples[name] = change(samples[name])

    return changed(change_one)


def all_layers(change: Callable[[Tensor], Tensor]) -> BrokenEngine:
    """An engine in which every parameter's per-sample gradients are wrong in the same way."""

    def change_all(samples: Samples) -> None:
        for name, g in samples.items():
            samples[name] = change(g)

    return changed(change_all)


def last_dropped(g: Tensor) -> Tensor:
    return torch.cat([g[:-1], torch.zeros_like(g[-1:])])


def first_twice(g: Tensor) -> Tensor:
    return torch.cat([g, g[:1]])


def swapped(g: Tensor) -> Tensor:
    return g[[1, 0, *range(2, len(g))]]


class StaleActivation(Changed):
    """The linear layer ``first`` still holds the activations of an earlier batch."""

    def change(self, samples: Samples) -> None:  # type: ignore[override]
        outer = samples["first.bias"]  # of a linear layer called once: the gradient of its output
        earlier = torch.randn(len(outer), self.model.first.in_features, dtype=outer.dtype)
        samples["first.weight"] = torch.einsum("bo,bi->boi", outer, earlier)


class Uses(MicrobatchHandle):
    """Sees every use of the layer ``cell`` apart; ``parts`` holds the weight of every use of every sample."""

    forget_use: int | None = None

    def __init__(self, module: nn.Module, plan: Any) -> None:
        super().__init__(module, plan)
        self.parts: list[list[Tensor]] = []

    def _one(self, *args: Any) -> Any:
        cell, used = self.model.cell, []

        def forward(x: Tensor) -> Tensor:
            weight, bias = cell.weight * 1, cell.bias
            if len(used) == self.forget_use:
                weight = weight.detach()
            else:
                weight.retain_grad()
            used.append(weight)
            return F.linear(x, weight, bias)

        vars(cell)["forward"] = forward
        try:
            return super()._one(*args)
        finally:
            del vars(cell)["forward"]
            self.parts.append(used)


class Clipping(Uses):
    """An engine that clips by itself, from norms that are wrong."""

    clips = True
    factors: Callable[[Clipping, Samples, float], Tensor]  # set on the instance, so called with the handle itself

    def announce(self, parameters: list[nn.Parameter]) -> list[int]:
        return self.collect(parameters)

    def clip_and_accumulate(self, parameters: list[nn.Parameter], max_grad_norm: float) -> None:
        self.collect(parameters)
        samples = {n: p.grad_sample for n, p in self._parameters.items()}
        factors = self.factors(self, samples, max_grad_norm)
        for p in parameters:
            p.summed_grad = torch.einsum("b,b...->...", factors, p.grad_sample)


def clipping(factors: Callable[[Clipping, Samples, float], Tensor]) -> BrokenEngine:
    """An engine that clips by itself with some factors."""
    return BrokenEngine(Clipping, factors=factors)


def squares(samples: Samples) -> Tensor:
    """Squared norm of every sample's gradient."""
    return sum(g.flatten(1).square().sum(1) for g in samples.values())


def right_factors(handle: Clipping, samples: Samples, clip_norm: float) -> Tensor:
    return (clip_norm / (squares(samples).sqrt() + 1e-6)).clamp(max=1)


def norm_of_parts(handle: Clipping, samples: Samples, clip_norm: float) -> Tensor:
    """Adds up the squared norms of the uses of a weight, instead of the squared norm of their sum."""
    scale = len(handle.parts)
    parts = torch.stack([sum((scale * w.grad).square().sum() for w in uses) for uses in handle.parts])
    others = squares({n: g for n, g in samples.items() if n != "cell.weight"})
    return (clip_norm / ((parts + others).sqrt() + 1e-6)).clamp(max=1)


def norm_without_a_layer(handle: Clipping, samples: Samples, clip_norm: float) -> Tensor:
    return right_factors(handle, {n: g for n, g in samples.items() if n != "head.bias"}, clip_norm)


def norm_per_layer(handle: Clipping, samples: Samples, clip_norm: float) -> Tensor:
    return torch.stack([right_factors(handle, {n: g}, clip_norm) for n, g in samples.items()]).mean(0)


def factors_of_neighbours(handle: Clipping, samples: Samples, clip_norm: float) -> Tensor:
    return right_factors(handle, samples, clip_norm).roll(1)


def largest_element(handle: Clipping, samples: Samples, clip_norm: float) -> Tensor:
    worst = torch.stack([g.flatten(1).abs().amax(1) for g in samples.values()]).amax(0)
    return (clip_norm / (worst + 1e-6)).clamp(max=1)


# ------------------------------------------------------------------ models to break


class Layers(nn.Module):
    """A linear layer called once, a square one called twice, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.cell, self.head = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.cell(torch.tanh(self.first(x))))
        return self.head(torch.tanh(self.cell(x)))


@pytest.fixture
def layers() -> Looked:
    torch.manual_seed(1)
    return look(Layers().double(), labelled(5))


# Name -> (engine, the parameter that has to be named). A fault that only shifts norms spoils every parameter alike.
MUTATIONS: dict[str, tuple[Callable[[], BrokenEngine], str]] = {
    "scale off by the batch size": (lambda: all_layers(lambda g: g / len(g)), ""),
    "rows of one layer permuted": (lambda: one_layer("first.weight", lambda g: g.roll(1, 0)), ""),
    "samples swapped between two layers": (lambda: one_layer("head.weight", swapped), ""),
    "last sample dropped": (lambda: all_layers(last_dropped), ""),
    "first sample counted twice": (lambda: all_layers(first_twice), ""),
    "stale activation": (lambda: BrokenEngine(StaleActivation), "first.weight"),
    "second use forgotten": (lambda: BrokenEngine(Uses, forget_use=1), "cell.weight"),
    "first use forgotten": (lambda: BrokenEngine(Uses, forget_use=0), "cell.weight"),
    "bias missing": (lambda: one_layer("first.bias", torch.zeros_like), "first.bias"),
    "transposed weight gradient": (lambda: one_layer("cell.weight", lambda g: g.mT.contiguous()), "cell.weight"),
    "sign flipped": (lambda: one_layer("head.bias", torch.neg), "head.bias"),
    "one layer 5 % too large": (lambda: one_layer("head.weight", lambda g: 1.05 * g), "head.weight"),
    "one layer 5 % too small": (lambda: one_layer("cell.bias", lambda g: 0.95 * g), "cell.bias"),
    "not a number in a layer": (lambda: one_layer("cell.bias", lambda g: g * torch.nan), ""),
    "samples averaged in a layer": (lambda: one_layer("first.weight", lambda g: g.mean(0).expand_as(g)), "first.weight"),
    "clip before the sum of two uses": (lambda: clipping(norm_of_parts), ""),
    "norm without a layer": (lambda: clipping(norm_without_a_layer), ""),
    "every layer clipped alone": (lambda: clipping(norm_per_layer), ""),
    "factors of the neighbours": (lambda: clipping(factors_of_neighbours), ""),
    "norm of the largest element": (lambda: clipping(largest_element), ""),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_broken_engine_is_caught(layers: Looked, name: str) -> None:
    make, parameter = MUTATIONS[name]
    evidence = layers.check(make())
    assert not evidence.passed, evidence
    if parameter:
        assert f"`{parameter}`" in evidence.reason


def single_precision() -> list[tuple[Tensor, int]]:
    return [(x.float(), y) for x, y in labelled(5)]


class Rounded(Changed):
    """Per-sample gradients to half a per cent in single precision, right in double precision."""

    def change(self, samples: Samples) -> None:  # type: ignore[override]
        for name, g in samples.items():
            if g.dtype == torch.float32:
                samples[name] = 1.005 * g


def test_error_of_rounding_is_told_from_a_fault() -> None:
    torch.manual_seed(1)
    looked = look(Layers(), single_precision())
    assert looked.check(BrokenEngine(Rounded)).passed
    wrong = looked.check(one_layer("head.weight", lambda g: 1.005 * g))
    assert not wrong.passed and "`head.weight`" in wrong.reason
    assert not looked.check(one_layer("head.weight", lambda g: 1.1 * g)).passed


class NearlyConstant(nn.Module):
    """A normalisation of what is nearly the same everywhere: in single precision, half of it is rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(5, 4), nn.LayerNorm(4, eps=1e-16), nn.Linear(4, 3)
        with torch.no_grad():
            self.first.weight.mul_(1e-6)
            self.first.bias.fill_(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.first(x)))


class RoundedTwice(Changed):
    """Per-sample gradients to a tenth in single precision, right in double precision."""

    def change(self, samples: Samples) -> None:  # type: ignore[override]
        for name, g in samples.items():
            if g.dtype == torch.float32:
                samples[name] = 1.1 * g


def test_an_engine_may_round_as_the_plain_model_does() -> None:
    torch.manual_seed(1)
    ordinary, looked = look(Layers(), single_precision()), look(NearlyConstant(), single_precision())
    assert not ordinary.check(BrokenEngine(RoundedTwice)).passed
    assert looked.check(BrokenEngine(RoundedTwice)).passed
    assert not looked.check(one_layer("first.weight", lambda g: 1.1 * g)).passed


def test_the_same_engines_pass_without_a_fault(layers: Looked) -> None:
    for engine in (BrokenEngine(Changed, change=lambda samples: None), BrokenEngine(Uses), clipping(right_factors)):
        assert layers.check(engine).passed
    assert clipping(right_factors).attach(layers.model, layers.plan).clips


def test_rows_that_are_missing_are_counted(layers: Looked) -> None:
    class Short(MicrobatchHandle):
        def collect(self, parameters: list[nn.Parameter]) -> list[int]:
            super().collect(parameters)
            for p in parameters:
                p.grad_sample = p.grad_sample[1:]
            return [len(parameters[0].grad_sample)]

    evidence = layers.check(BrokenEngine(Short))
    assert not evidence.passed and "[3] rows instead of 4 samples" in evidence.reason


@pytest.mark.parametrize("name", ["scale off by the batch size", "norm without a layer", "norm of the largest element"])
def test_bound_is_broken_by_wrong_norms(layers: Looked, name: str) -> None:
    """The third proof, by itself: what leaving a sample out moves, without any reference."""
    engine = MUTATIONS[name][0]()
    moved = [layers.movement(engine, i) for i in range(4)]
    right = clipping(right_factors)
    assert all(layers.check_bounded(right, i).passed and layers.movement(right, i) <= 1.001 for i in range(4))
    if name != "scale off by the batch size":  # a sum that is too small is wrong, but bounded
        assert max(moved) > 1.001


# ------------------------------------------------------------------ any model


def opacus_is_right(looked: Looked, mode: str) -> bool:
    """Whether Opacus's own hooks leave the gradients of single samples, as an ordinary loop computes them."""
    wanted = gradients_one_by_one(looked.model, classify, looked.samples.singles)
    hooked = GradSampleModule(looked.model, force_functorch=mode == "functorch")
    try:
        classify(hooked, looked.samples.batch).backward()
        found = {n: getattr(p, "grad_sample", None) for n, p in looked.model.named_parameters()}
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError, KeyError):
        return False
    finally:
        hooked.to_standard_module()
        for p in looked.model.parameters():
            p.grad = None
    if any(not isinstance(found[n], Tensor) or found[n].shape != (4, *g.shape) for n, g in wanted[0].items()):
        return False
    return all(relative_error({n: found[n][i] for n in g}, g) <= 1e-5 for i, g in enumerate(wanted))


@pytest.mark.parametrize(
    "broken",
    [
        lambda g: g.index_fill(2, torch.tensor([0]), 0) if g.ndim > 2 else g,
        lambda g: g.index_fill(1, torch.tensor([1]), 0) if g.ndim > 2 else g,
        lambda g: g.transpose(1, 2).reshape(g.shape) if g.ndim > 2 else g,
        lambda g: g.roll(1, -1),
    ],
    ids=["a column is missing", "a row is missing", "in another order", "moved by one"],
)
def test_an_engine_that_is_wrong_in_a_part_of_a_large_parameter_is_found(broken: Callable[[Tensor], Tensor]) -> None:
    looked = look(
        nn.Sequential(nn.Linear(50, 400), nn.Tanh(), nn.Linear(400, 50), nn.Tanh(), nn.Linear(50, 3)).double(),
        labelled(50),
    )
    evidence = looked.check(all_layers(broken))
    assert not evidence.passed and evidence.max_error is not None and evidence.max_error > 1e-3


def check_right_engines(looked: Looked) -> None:
    for i, (ours, independent) in enumerate(
        zip(looked.wanted.gradients, gradients_one_by_one(looked.model, classify, looked.samples.singles), strict=True)
    ):
        assert relative_error(ours, independent) <= 1e-8, f"the reference of sample {i} is wrong"
    for name, engine in ENGINES.items():
        verdict = engine.supports(looked.model, looked.record)
        if not verdict:
            assert name != "microbatch", verdict.reason
            event(f"{name}: not supported")
            continue
        evidence = looked.check(engine)
        event(f"{name}: {'passed' if evidence.passed else 'refused'}")
        if not evidence.passed and name in OPACUS:
            assert not opacus_is_right(looked, name), f"{name} is right, but: {evidence.reason}"
        elif not evidence.passed:  # an engine may give up on a model, with an error; it may not be wrong
            assert name != "microbatch" and evidence.max_error is None, f"{name}: {evidence.reason}"


def check_broken_engines(looked: Looked) -> None:
    sizes = {n: float(sum(g[n].norm() for g in looked.wanted.gradients)) for n in looked.wanted.gradients[0]}
    largest = max(sizes, key=lambda n: sizes[n])
    for engine in (
        all_layers(lambda g: g / len(g)),
        all_layers(last_dropped),
        all_layers(first_twice),
        one_layer(largest, torch.neg),
        one_layer(largest, torch.zeros_like),
        one_layer(largest, lambda g: 1.05 * g),
    ):
        assert not looked.check(engine).passed


@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
@given(models())
def test_right_engines_pass_and_broken_ones_do_not(example: Example) -> None:
    model, items = example
    looked = look(model, items)
    assert not looked.record.layout_problem
    check_right_engines(looked)
    check_broken_engines(looked)

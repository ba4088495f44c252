"""Module calls that no gradient comes back to run without a graph, and nothing else changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dpfix
from dpfix.engines import ENGINES
from tests.helpers import sgd
from tests.reference import Step, clipped_sum, gradients_one_by_one, relative_error

every_engine = pytest.mark.parametrize("engine", ENGINES)


class StopGradient(torch.autograd.Function):
    """What some code bases have instead of detach."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> None:
        return None


def away(z: Tensor) -> Tensor:
    """A helper far from the model."""
    return z.detach()


CUTS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "detach": (lambda z: z.detach(), "detach"),
    "helper": (away, "detach"),
    "data": (lambda z: z.data, r"\.data"),
    "function": (StopGradient.apply, ""),  # type: ignore[dict-item]
}


class Pair(nn.Module):
    """One side of SimSiam: the second view's features are the target of the first one's prediction."""

    def __init__(self, cut: Callable[[Tensor], Tensor] = CUTS["detach"][0]) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 8))
        self.predictor = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 8))
        self.cut = cut

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        z = self.encoder(a)
        target = self.encoder(b)
        return self.predictor(z), self.cut(target)


def negative_cosine(p: Tensor, z: Tensor) -> Tensor:
    return -F.cosine_similarity(p, z.detach(), dim=1).mean()


def pair(model: nn.Module, batch: Any) -> Tensor:
    return negative_cosine(*model(*batch))


def views(samples: int = 24) -> TensorDataset:
    draw = torch.Generator().manual_seed(4)
    return TensorDataset(*(torch.randn(samples, 6, generator=draw) for _ in range(2)))


def start(model: nn.Module, step: Step = pair, engine: str = "auto", **changes: Any) -> dpfix.PrivateTraining:
    given: dict[str, Any] = {
        "module": model,
        "optimizer": sgd(model),
        "data_loader": DataLoader(views(), batch_size=8),
        "noise_multiplier": 0.0,
        "max_grad_norm": 0.3,
        "training_step": step,
        "grad_sample_mode": engine,
    }
    return dpfix.make_private_safe(**given | changes)


def make_step(training: Any, step: Step) -> Any:
    batch = next(b for b in training[2] if len(b[0]) > 1)
    training[1].zero_grad()
    step(training[0], batch).backward()
    training[1].step()
    return batch


def assert_releases_the_clipped_sum(training: Any, model: nn.Module, plain: nn.Module, step: Step) -> None:
    """One step moves the model as far as the clipped sum of the untouched model's gradients does."""
    plain.load_state_dict(model.state_dict())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    batch = make_step(training, step)
    singles = [[t[i : i + 1] for t in batch] for i in range(len(batch[0]))]
    wanted = clipped_sum(gradients_one_by_one(plain, step, singles), 0.3)
    moved = {n: (before[n] - p.detach()) * training[1].expected_batch_size for n, p in model.named_parameters()}
    assert relative_error(moved, wanted) <= 1e-3


# ------------------------------------------------------------------ found, and exact


@pytest.mark.parametrize("name", CUTS)
def test_call_behind_a_cut_is_a_region(name: str) -> None:
    cut, what = CUTS[name]
    torch.manual_seed(0)
    model = Pair(cut)
    training = start(model)
    (region,) = training.plan.no_grad_regions
    assert region.site.path == "encoder" and region.site.line.startswith("test_no_grad_regions.py:")
    assert region.saved_bytes > 0
    (finding,) = [f for f in training.report.findings if f.code == "DPF026"]
    text = str(finding)
    assert "`encoder`" in text and "MB" in text and "with torch.no_grad():" in text
    if what:
        assert f"{what.replace(chr(92), '')} at test_no_grad_regions.py:" in text


@every_engine
def test_what_is_released_is_the_same(engine: str) -> None:
    torch.manual_seed(0)
    model = Pair()
    plain = copy.deepcopy(model)
    training = start(model, engine=engine)
    assert training.plan.no_grad_regions
    for _ in range(3):
        assert_releases_the_clipped_sum(training, model, plain, pair)


@every_engine
def test_detach_in_the_loss_and_the_model_called_twice(engine: str) -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    def step(model: nn.Module, batch: Any) -> Tensor:
        return negative_cosine(model(batch[0]), model(batch[1]))

    torch.manual_seed(0)
    model = Encoder()
    plain = copy.deepcopy(model)
    training = start(model, step, engine)
    (region,) = training.plan.no_grad_regions
    assert (region.site.path, region.site.root) == ("", 1)
    for _ in range(3):
        assert_releases_the_clipped_sum(training, model, plain, step)


def symmetric(model: nn.Module, batch: Any) -> Tensor:
    p1, p2, z1, z2 = model(*batch)
    return (negative_cosine(p1, z2) + negative_cosine(p2, z1)) / 2


class SimSiam(Pair):
    """The official form: every encoding is also used with gradient, so that its detach cuts nothing."""

    def forward(self, a: Tensor, b: Tensor) -> Any:
        z1, z2 = self.encoder(a), self.encoder(b)
        return self.predictor(z1), self.predictor(z2), z1.detach(), z2.detach()


@every_engine
def test_detach_that_cuts_nothing_is_left_alone(engine: str) -> None:
    torch.manual_seed(0)
    model = SimSiam()
    plain = copy.deepcopy(model)
    training = start(model, symmetric, engine)
    assert training.plan.no_grad_regions == ()
    assert not any(f.code == "DPF026" for f in training.report.findings)
    for _ in range(2):
        assert_releases_the_clipped_sum(training, model, plain, symmetric)


class Byol(nn.Module):
    """Online and target network; the target follows by a moving average in the loop."""

    def __init__(self, *, no_grad: bool) -> None:
        super().__init__()
        self.online, self.predictor = nn.Linear(6, 8), nn.Linear(8, 8)
        self.target = copy.deepcopy(self.online)
        self.no_grad = no_grad

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        with torch.set_grad_enabled(not self.no_grad):
            target = self.target(b)
        return self.predictor(self.online(a)), target.detach()

    @torch.no_grad()
    def follow(self) -> None:
        for slow, fast in zip(self.target.parameters(), self.online.parameters(), strict=True):
            slow.lerp_(fast, 0.1)


@pytest.mark.parametrize("no_grad", [True, False])
def test_byol_trains_and_its_target_follows(no_grad: bool) -> None:
    torch.manual_seed(0)
    model = Byol(no_grad=no_grad)
    plain = copy.deepcopy(model)
    training = start(model)
    start_of_target = model.target.weight.detach().clone()
    for _ in range(3):
        assert_releases_the_clipped_sum(training, model, plain, pair)
        model.follow()
    assert not torch.equal(model.target.weight, start_of_target)
    training[0].to_standard_module()
    assert all(p.requires_grad for p in model.target.parameters())


def test_outermost_call_is_taken() -> None:
    class Nested(Pair):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Sequential(nn.Linear(6, 8), nn.ReLU()), nn.Linear(8, 8))

    assert [r.site.path for r in start(Nested()).plan.no_grad_regions] == ["encoder"]


def test_calls_of_a_loop_are_told_apart() -> None:
    class Views(Pair):
        def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            z = [self.encoder(x) for x in (a, b)]
            return self.predictor(z[0]), z[1].detach()

    torch.manual_seed(0)
    model = Views()
    plain = copy.deepcopy(model)
    training = start(model)
    (region,) = training.plan.no_grad_regions
    assert (region.site.number, region.of) == (1, 2)
    assert_releases_the_clipped_sum(training, model, plain, pair)


def test_turned_off() -> None:
    torch.manual_seed(0)
    model = Pair()
    plain = copy.deepcopy(model)
    training = start(model, no_grad_regions=False)
    assert training.plan.no_grad_regions == ()
    assert_releases_the_clipped_sum(training, model, plain, pair)


def test_region_changes_nothing_else() -> None:
    """Parameters used twice, dropout: the same gradients as without regions."""

    class Dropped(Pair):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.5), nn.Linear(16, 8))

    released = []
    for on in (True, False):
        torch.manual_seed(0)
        model = Dropped()
        training = start(model, no_grad_regions=on, grad_sample_mode="bookkeeping", seed=1)
        assert bool(training.plan.no_grad_regions) is on
        torch.manual_seed(1)
        make_step(training, pair)
        released.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    torch.testing.assert_close(*released)


# ------------------------------------------------------------------ the graph is not built


def graph_bytes(training: Any, batch: Any, model: nn.Module) -> int:
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        pair(training[0], batch)
    return sum(size for place, size in seen.items() if place not in own)


def test_graph_of_the_cut_branch_is_not_built() -> None:
    torch.manual_seed(0)
    batch = views()[:16]
    sizes = []
    for on in (True, False):
        model = Pair()
        training = start(model, no_grad_regions=on, grad_sample_mode="microbatch")
        sizes.append(graph_bytes(training, batch, model))
    assert sizes[0] < 0.75 * sizes[1]


# ------------------------------------------------------------------ the tripwire


class Switch(Pair):
    """From some step on the target has gradient, too."""

    cutting = True

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        z = self.encoder(a)
        target = self.encoder(b)
        return self.predictor(z), target.detach() if self.cutting else target


def cosine(model: nn.Module, batch: Any) -> Tensor:
    return -F.cosine_similarity(*model(*batch), dim=1).mean()


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
def test_gradient_that_reaches_a_region_stops_the_step_and_the_next_one_is_right(engine: str) -> None:
    torch.manual_seed(0)
    model = Switch()
    plain = copy.deepcopy(model)
    training = start(model, cosine, engine)
    assert_releases_the_clipped_sum(training, model, plain, cosine)
    assert len(training.plan.no_grad_regions) == 1
    model.cutting = plain.cutting = False
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    steps = len_of_history(training)
    with pytest.warns(dpfix.DPFixWarning, match="reached the output of `encoder`(.|\n)*loop has nothing to do"):
        make_step(training, cosine)
    assert torch.equal(nn.utils.parameters_to_vector(model.parameters()), before)
    assert len_of_history(training) == steps + 1  # the draw is counted
    assert training.plan.no_grad_regions == ()
    for _ in range(2):
        assert_releases_the_clipped_sum(training, model, plain, cosine)


def len_of_history(training: Any) -> int:
    return sum(entry[-1] for entry in training.privacy_engine.accountant.history)


@every_engine
def test_exception_inside_a_region_leaves_grad_mode_alone(engine: str) -> None:
    class Fragile(Pair):
        broken = False

        def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            z = self.encoder(a)
            target = self.encoder(b[:, :1] if self.broken else b)
            return self.predictor(z), target.detach()

    torch.manual_seed(0)
    model = Fragile()
    plain = copy.deepcopy(model)
    training = start(model, engine=engine)
    assert training.plan.no_grad_regions
    model.broken = True
    with pytest.raises(RuntimeError, match=r"shapes cannot be multiplied|size|mat1"):
        make_step(training, pair)
    assert torch.is_grad_enabled()
    model.broken = False
    assert_releases_the_clipped_sum(training, model, plain, pair)


def test_evaluation_and_copies_are_ordinary() -> None:
    torch.manual_seed(0)
    model = Pair(lambda z: z)
    training = start(model)  # the loss cuts
    assert training.plan.no_grad_regions
    twin = copy.deepcopy(model)
    model.eval()
    for m in (model, twin.train()):
        _, target = m(*views()[:3])
        assert target.grad_fn is not None and "Tripwire" not in type(target.grad_fn).__name__
    model.train()
    training[0].to_standard_module()
    assert "_call_impl" not in vars(model) and "_call_impl" not in vars(model.encoder)

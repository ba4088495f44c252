"""What is noticed while training, before any parameter moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import dpfix
from dpfix.engines import ENGINES
from tests.cases import FixedNorm, mlp
from tests.helpers import points, setting, sgd, train
from tests.reference import clipped_sum, gradients_one_by_one, relative_error

every_engine = pytest.mark.parametrize("engine", ENGINES)


def start(engine: str = "auto", **changes: Any) -> tuple[nn.Module, dpfix.PrivateTraining]:
    model = changes.pop("model", None) or mlp()
    given = setting(model, grad_sample_mode=engine, **({"optimizer": sgd(model)} | changes))
    return model, dpfix.make_private_safe(**given)


def loss_of(training: Any, batch: Any) -> Tensor:
    return F.cross_entropy(training[0](batch[0]), batch[1])


def values(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def refused(model: nn.Module, error: type[Exception], says: str, act: Callable[[], Any]) -> None:
    """The act is refused with a message, and no parameter has moved."""
    before = values(model)
    with pytest.raises(error, match=says) as caught:
        act()
    assert torch.equal(values(model), before)
    assert isinstance(caught.value, dpfix.MisuseError) and len(str(caught.value)) >= 40


def first_batch(training: Any) -> Any:
    return next(batch for batch in training[2] if len(batch[0]))


@every_engine
def test_accumulated_batches_are_refused(engine: str) -> None:
    model, training = start(engine)

    def act() -> None:
        for _, batch in zip(range(2), training[2], strict=False):
            loss_of(training, batch).backward()
        training[1].step()

    refused(model, dpfix.AccumulationError, "backward pass", act)


@every_engine
def test_rows_of_the_original_loader_are_refused(engine: str) -> None:
    data = DataLoader(points(), batch_size=8)
    model, training = start(engine, data_loader=data)
    loss_of(training, next(iter(data))).backward()
    refused(model, dpfix.ForeignBatchError, "data_loader that make_private_safe returned", training[1].step)


@every_engine
def test_repeated_and_filtered_rows_are_refused(engine: str) -> None:
    model, training = start(engine)
    for rows in (lambda t: t.repeat_interleave(2, 0), lambda t: t[:-1]):
        x, y = first_batch(training)
        training[1].zero_grad()
        loss_of(training, (rows(x), rows(y))).backward()
        refused(model, dpfix.ForeignBatchError, "drew", training[1].step)


@every_engine
def test_second_step_on_a_batch_is_refused(engine: str) -> None:
    model, training = start(engine)
    batch = first_batch(training)
    loss_of(training, batch).backward()
    training[1].step()
    training[1].zero_grad()
    loss_of(training, batch).backward()
    refused(model, dpfix.ForeignBatchError, "without a new batch", training[1].step)


@every_engine
def test_step_without_backward_is_refused(engine: str) -> None:
    model, training = start(engine)
    first_batch(training)
    refused(model, dpfix.MisuseError, "no per-sample gradient", training[1].step)


@every_engine
def test_step_of_the_original_optimizer_is_refused(engine: str) -> None:
    model, training = start(engine)
    loss_of(training, first_batch(training)).backward()
    refused(model, dpfix.MisuseError, "past the private optimizer", training[1].original_optimizer.step)
    training[1].step()


def test_grad_scaler_is_refused() -> None:
    model, training = start()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(training, first_batch(training))).backward()
    refused(model, dpfix.MisuseError, "GradScaler", lambda: scaler.step(training[1]))


@every_engine
def test_edited_gradients_are_announced(engine: str) -> None:
    model, training = start(engine)
    loss_of(training, first_batch(training)).backward()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.warns(dpfix.DPFixWarning, match=r"p\.grad of `0\.weight` was changed"):
        training[1].step()


def test_penalty_on_weights_is_refused() -> None:
    model, training = start("microbatch")
    penalty = sum(p.square().sum() for p in model.parameters())
    (loss_of(training, first_batch(training)) + penalty).backward()
    refused(model, dpfix.PlanBrokenError, "weight_decay", training[1].step)


class Fixed(FixedNorm):
    """Its BatchNorm is frozen by hand, so ``train()`` switches it on."""

    def train(self, mode: bool = True) -> Fixed:
        return nn.Module.train(self, mode)  # type: ignore[return-value]


def test_batch_norm_switched_on_is_refused() -> None:
    model = Fixed()
    model.body[1].eval()
    data = DataLoader([(torch.randn(2, 6, 6), i % 3) for i in range(24)], batch_size=8)
    _, training = start(model=model, data_loader=data)
    loss_of(training, first_batch(training)).backward()
    training[1].step()
    training[1].zero_grad()
    training[0].train()
    batch = first_batch(training)
    refused(
        model,
        dpfix.PlanBrokenError,
        r"`body\.1`.*eval",
        lambda: (loss_of(training, batch).backward(), training[1].step()),
    )


def test_replaced_layer_is_refused() -> None:
    model, training = start()
    batch = first_batch(training)
    model[2] = nn.Linear(8, 3)
    before = values(model)
    with pytest.raises(dpfix.MisuseError):
        loss_of(training, batch).backward()
        training[1].step()
    assert torch.equal(values(model), before)


@every_engine
@pytest.mark.parametrize("flag", ["freeze", "unfreeze"])
def test_changed_requires_grad_is_refused(engine: str, flag: str) -> None:
    model = mlp()
    model[0].bias.requires_grad_(flag == "freeze")
    _, training = start(engine, model=model)
    model[0].bias.requires_grad_(flag == "unfreeze")
    batch = first_batch(training)

    def act() -> None:
        loss_of(training, batch).backward()
        training[1].step()

    refused(model, dpfix.PlanBrokenError, r"`0\.bias`", act)


@every_engine
def test_added_layer_without_parameters_is_refused(engine: str) -> None:
    model, training = start(engine)
    model.append(nn.Softmax(dim=0))
    batch = first_batch(training)
    refused(
        model,
        dpfix.PlanBrokenError,
        rf"module `{len(model) - 1}`",
        lambda: (loss_of(training, batch).backward(), training[1].step()),
    )


def test_parameter_moved_to_another_group_is_accepted_and_one_taken_out_is_not() -> None:
    model, training = start()
    assert train(training, 1) == 1
    groups = training[1].param_groups
    groups.append({**groups[0], "params": [groups[0]["params"].pop()]})
    assert train(training, 2) == 2
    groups.pop()
    training[1].zero_grad()
    loss_of(training, first_batch(training)).backward()
    refused(model, dpfix.PlanBrokenError, "param_groups", training[1].step)


def test_added_group_is_refused() -> None:
    model, training = start()
    training[1].original_optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    loss_of(training, first_batch(training)).backward()
    refused(model, dpfix.PlanBrokenError, "param_groups", training[1].step)


@every_engine
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradient_that_is_not_finite_is_refused(engine: str, value: float) -> None:
    model, training = start(engine)
    (loss_of(training, first_batch(training)) * value).backward()
    generator = torch.get_rng_state()
    refused(model, dpfix.NonFiniteGradientError, "not finite", training[1].step)
    assert torch.equal(torch.get_rng_state(), generator), "no noise was drawn"
    training[1].zero_grad()
    assert train(training, 2) == 2


# ------------------------------------------------------------------ what has to keep working


def wanted(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    """The clipped sum at clip norm 1."""
    samples = gradients_one_by_one(
        model, lambda m, b: F.cross_entropy(m(b[0]), b[1]), [(x[None], y[None]) for x, y in zip(*batch, strict=True)]
    )
    return clipped_sum(samples, 1.0)


def assert_steps_rightly(engine: str, act: Callable[[nn.Module, Any, Any], None], steps: int = 2) -> None:
    """A way to write the loop releases the clipped sum of the batch, in the first step and the next."""
    plain = mlp()
    model, training = start(engine, model=plain, noise_multiplier=0.0)
    batches = iter(training[2])
    for _ in range(steps):
        batch = next(batches)
        reference = mlp()
        reference.load_state_dict(model.state_dict())
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        act(model, training, batch)
        moved = {n: (before[n] - p.detach()) * 8 for n, p in model.named_parameters()}
        assert relative_error(moved, wanted(reference, batch)) < 2e-3


def zero_between(model: nn.Module, training: Any, batch: Any) -> None:
    loss = loss_of(training, batch)
    training[1].zero_grad()
    loss.backward()
    training[1].step()


def forward_only_before(model: nn.Module, training: Any, batch: Any) -> None:
    training[1].zero_grad()
    loss_of(training, batch).item()
    loss_of(training, batch).backward()
    training[1].step()


def forward_only_after(model: nn.Module, training: Any, batch: Any) -> None:
    training[1].zero_grad()
    loss_of(training, batch).backward()
    training[0](batch[0])
    training[1].step()


def no_grad_logging(model: nn.Module, training: Any, batch: Any) -> None:
    training[1].zero_grad()
    loss_of(training, batch).backward()
    training[0].eval()
    with torch.no_grad():
        training[0](batch[0])
    training[0].train()
    training[1].step()


def model_zero_grad(model: nn.Module, training: Any, batch: Any) -> None:
    loss_of(training, batch).backward()
    training[0].zero_grad()
    loss_of(training, batch).backward()
    training[1].step()


def zero_grad_to_none(model: nn.Module, training: Any, batch: Any) -> None:
    training[1].zero_grad(set_to_none=True)
    loss_of(training, batch).backward()
    training[1].step()


def zero_grad_after(model: nn.Module, training: Any, batch: Any) -> None:
    loss_of(training, batch).backward()
    training[1].step()
    training[1].zero_grad()


def closure(model: nn.Module, training: Any, batch: Any) -> None:
    def evaluate() -> float:
        training[1].zero_grad()
        loss = loss_of(training, batch)
        loss.backward()
        return float(loss.detach())

    training[1].step(evaluate)


LOOPS = (
    zero_between, forward_only_before, forward_only_after, no_grad_logging, model_zero_grad, zero_grad_to_none,
    zero_grad_after, closure,
)  # fmt: skip


@every_engine
@pytest.mark.parametrize("loop", LOOPS, ids=lambda f: f.__name__)
def test_ways_to_write_the_loop(engine: str, loop: Callable[[nn.Module, Any, Any], None]) -> None:
    assert_steps_rightly(engine, loop)


@every_engine
def test_generator_learns_through_a_private_discriminator(engine: str) -> None:
    """The generator's own step sends gradient through the private model and releases nothing of its parameters."""
    discriminator, training = start(engine)
    generator = nn.Linear(4, 6)
    own = sgd(generator, 0.1)
    for x, y in training[2]:
        moved, learnt = values(discriminator), values(generator)
        training[1].zero_grad()
        F.cross_entropy(training[0](x), y).backward()
        training[1].step()
        assert not torch.equal(values(discriminator), moved)
        own.zero_grad()
        F.cross_entropy(training[0](generator(torch.randn(5, 4))), torch.zeros(5, dtype=torch.long)).backward()
        own.step()
        assert not torch.equal(values(generator), learnt)


class Remembers(nn.Module):
    """Its loop reads an auxiliary loss from attributes that every forward pass sets anew (deep supervision does so)."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.side, self.head = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 3)
        self.heads: list[Tensor] = [torch.zeros(1)]
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(x))
        self.heads[0], self.last = self.side(hidden), hidden.detach()
        return self.head(hidden) + self.heads[0]


@every_engine
def test_what_forward_keeps_of_a_batch_is_gone_after_the_step(engine: str) -> None:
    model = Remembers()
    heads = model.heads
    _, training = start(engine, model=model)
    batch = first_batch(training)
    loss_of(training, batch).backward()
    assert model.last is not None  # the loop may read it until it makes its step
    training[1].step()
    assert model.last is None and model.heads is heads and torch.equal(heads[0], torch.zeros(1))
    assert any(f.code == "DPF025" and "`heads`" in f.fact for f in training.report.findings)


@every_engine
def test_parameters_written_to_before_the_step_are_refused(engine: str) -> None:
    """A step to the worst case nearby (SAM) moves along gradients without noise."""
    model, training = start(engine)
    training[1].zero_grad()
    loss_of(training, first_batch(training)).backward()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05)
    refused(model, dpfix.MisuseError, "written to between the model's forward pass", training[1].step)


@every_engine
def test_parameters_may_be_written_to_after_the_step(engine: str) -> None:
    """Weight decay by hand, averaging and clamping are post-processing."""
    model, training = start(engine)
    for _, batch in zip(range(2), training[2], strict=False):
        training[1].zero_grad()
        loss_of(training, batch).backward()
        training[1].step()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.9).clamp_(-1, 1)
    assert values(model).abs().max() <= 1

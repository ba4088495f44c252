"""What reaches a later step, the parameters or the model beside its arguments is stopped; what a right loop does there is not."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import dpfix
from dpfix.instrument.source import DPFixWarning
from tests.training.follow.scripts import Items
from tests.training.follow.test_couplings import labelled

STEPS = 10


class Scaled(nn.Module):
    """A model with a temperature that a script may set."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        self.temperature: Any = 1.0
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor, by: float = 1.0) -> Tensor:
        return self.inner(x) * self.temperature * self.scale * by


Run = tuple[Any, Any, Any]
Loop = Callable[[Any, Any, Any], Iterator[Any]]


def start(**told: Any) -> tuple[nn.Module, Run]:
    torch.manual_seed(0)
    model = Scaled()
    made = dpfix.make_private_safe(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
        data_loader=DataLoader(Items(labelled()), batch_size=8),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        seed=1,
        **told,
    )
    model, optimizer, loader = made
    return model, (model, optimizer, loader)


def step(model: Any, optimizer: Any, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def batches(loader: Any) -> Iterator[Any]:
    made = 0
    while made < STEPS:
        for batch in loader:
            yield batch
            made += 1


# ------------------------------------------------------------------ what is stopped


def frequencies_after_the_step(model: Any, optimizer: Any, loader: Any) -> None:
    seen = torch.ones(3)
    for x, y in batches(loader):
        step(model, optimizer, F.cross_entropy(model(x), y, reduction="none").mul(1 + seen[2] / seen.sum()).mean())
        seen = seen + torch.bincount(y, minlength=3)


def mean_after_the_step(model: Any, optimizer: Any, loader: Any) -> None:
    mean = torch.zeros(6)
    for x, y in batches(loader):
        step(model, optimizer, F.cross_entropy(model(x - mean), y))
        mean.mul_(0.9).add_(x.mean(0), alpha=0.1)


def derived_from_what_was_kept(model: Any, optimizer: Any, loader: Any) -> None:
    old = None
    for x, y in batches(loader):
        weight = 1.0 if old is None else old.square().mean() + 1
        step(model, optimizer, F.cross_entropy(model(x), y) * weight)
        old = x.abs()


def head_on_detached_features(model: Any, optimizer: Any, loader: Any) -> None:
    head = nn.Linear(3, 3)
    other = torch.optim.SGD(head.parameters(), lr=0.1)
    for x, y in batches(loader):
        out = model(x)
        step(model, optimizer, F.cross_entropy(out, y))
        other.zero_grad()
        F.cross_entropy(head(out.detach()), y).backward()
        other.step()


def head_updated_by_hand(model: Any, optimizer: Any, loader: Any) -> None:
    head = nn.Linear(3, 3)
    for x, y in batches(loader):
        head.zero_grad()
        step(model, optimizer, F.cross_entropy(head(model(x)), y))
        for p in head.parameters():
            p.data.add_(p.grad, alpha=-0.1)


def parameters_written_by_hand(model: Any, optimizer: Any, loader: Any) -> None:
    for x, y in batches(loader):
        step(model, optimizer, F.cross_entropy(model(x), y))
        next(model.parameters()).data.add_(0.01 * x.mean(0))


def parameters_written_before(model: Any, optimizer: Any, loader: Any) -> None:
    for x, y in batches(loader):
        with torch.no_grad():
            next(model.parameters()).sub_(0.01 * x.mean(0))
        step(model, optimizer, F.cross_entropy(model(x), y))


def rate_from_the_loss(model: Any, optimizer: Any, loader: Any) -> None:
    for x, y in batches(loader):
        loss = F.cross_entropy(model(x), y)
        optimizer.param_groups[0]["lr"] = 0.05 * loss.item()
        step(model, optimizer, loss)


def rate_is_a_statistic(model: Any, optimizer: Any, loader: Any) -> None:
    for x, y in batches(loader):
        optimizer.param_groups[0]["lr"] = x.std().item()
        step(model, optimizer, F.cross_entropy(model(x), y))


def rate_over_a_statistic(model: Any, optimizer: Any, loader: Any) -> None:
    for x, y in batches(loader):
        optimizer.param_groups[0]["lr"] = 0.05 / float(x.norm())
        step(model, optimizer, F.cross_entropy(model(x), y))


def attribute_is_a_tensor(model: Any, optimizer: Any, loader: Any) -> None:
    inner = next(m for m in model.modules() if isinstance(m, Scaled))
    for x, y in batches(loader):
        inner.temperature = x.std()
        step(model, optimizer, F.cross_entropy(model(x), y))


def attribute_is_a_number(model: Any, optimizer: Any, loader: Any) -> None:
    inner = next(m for m in model.modules() if isinstance(m, Scaled))
    for x, y in batches(loader):
        inner.temperature = x.std().item()
        step(model, optimizer, F.cross_entropy(model(x), y))


def buffer_is_filled(model: Any, optimizer: Any, loader: Any) -> None:
    inner = next(m for m in model.modules() if isinstance(m, Scaled))
    for x, y in batches(loader):
        inner.scale.fill_(x.std())
        step(model, optimizer, F.cross_entropy(model(x), y))


def hook_scales(model: Any, optimizer: Any, loader: Any) -> None:
    held: dict[str, Any] = {"scale": torch.ones(())}
    inner = next(m for m in model.modules() if isinstance(m, nn.Tanh))
    inner.register_forward_hook(lambda module, args, out: out * held["scale"])
    for x, y in batches(loader):
        held["scale"] = x.std()
        step(model, optimizer, F.cross_entropy(model(x), y))


def number_is_an_argument(model: Any, optimizer: Any, loader: Any) -> None:
    for x, y in batches(loader):
        step(model, optimizer, F.cross_entropy(model(x, by=x.std().item()), y))


def weights_by_numpy(model: Any, optimizer: Any, loader: Any) -> None:
    for x, y in batches(loader):
        weight = torch.from_numpy(1 + np.bincount(y.numpy(), minlength=3) / len(y)).float()
        step(model, optimizer, (weight[y] * F.cross_entropy(model(x), y, reduction="none")).mean())


def weights_of_a_list(model: Any, optimizer: Any, loader: Any) -> None:
    for x, y in batches(loader):
        labels = y.tolist()
        weight = torch.tensor([1.0 + labels.count(k) / len(labels) for k in range(3)])
        step(model, optimizer, (weight[y] * F.cross_entropy(model(x), y, reduction="none")).mean())


def centred_by_numpy(model: Any, optimizer: Any, loader: Any) -> None:
    for x, y in batches(loader):
        mean = torch.from_numpy(x.numpy().mean(0))
        step(model, optimizer, F.cross_entropy(model(x - mean), y))


def centred_in_place_by_numpy(model: Any, optimizer: Any, loader: Any) -> None:
    for x, y in batches(loader):
        values = x.numpy()
        values -= values.mean(0)
        step(model, optimizer, F.cross_entropy(model(x), y))


STOPPED = (
    frequencies_after_the_step, mean_after_the_step, derived_from_what_was_kept, head_on_detached_features,
    head_updated_by_hand, parameters_written_by_hand, parameters_written_before, rate_from_the_loss,
    rate_is_a_statistic, rate_over_a_statistic, attribute_is_a_tensor, attribute_is_a_number, buffer_is_filled, hook_scales,
    number_is_an_argument, weights_by_numpy, weights_of_a_list, centred_by_numpy, centred_in_place_by_numpy,
)  # fmt: skip


@pytest.mark.parametrize("loop", STOPPED, ids=[loop.__name__ for loop in STOPPED])
@pytest.mark.parametrize("told", [False, True], ids=["nothing", "criterion"])
def test_way_around_is_stopped(loop: Any, told: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", DPFixWarning)
        with pytest.raises((dpfix.DPFixError, DPFixWarning)):
            _, run = start(**({"criterion": F.cross_entropy} if told else {}))
            loop(*run)


# ------------------------------------------------------------------ what is right


def logged(model: Any, optimizer: Any, loader: Any) -> None:
    total, seen, log = torch.zeros(()), torch.zeros(3), []
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for x, y in batches(loader):
        loss = F.cross_entropy(model(x), y)
        step(model, optimizer, loss)
        total += loss.detach()
        seen += torch.bincount(y, minlength=3)
        log += [loss.item(), x.numpy().mean(), y.tolist(), float(seen.max())]
        schedule.step()
    assert total > 0 and log


def clipped_and_averaged(model: Any, optimizer: Any, loader: Any) -> None:
    average = [p.detach().clone() for p in model.parameters()]
    for x, y in batches(loader):
        step(model, optimizer, F.cross_entropy(model(x), y))
        with torch.no_grad():
            for a, p in zip(average, model.parameters(), strict=True):
                p.clamp_(-2, 2)
                p.data.mul_(0.999)
                a.lerp_(p, 0.1)


def annealed_temperature(model: Any, optimizer: Any, loader: Any) -> None:
    inner = next(m for m in model.modules() if isinstance(m, Scaled))
    for number, (x, y) in enumerate(batches(loader)):
        inner.temperature = 1.0 + 0.01 * number
        inner.scale.fill_(1.0 - 0.01 * number)
        loss = F.cross_entropy(model(x, by=0.9 + 0.01 * number), y)
        loss.item()
        step(model, optimizer, loss)


def warmed_up_by_hand(model: Any, optimizer: Any, loader: Any) -> None:
    for number, (x, y) in enumerate(batches(loader)):
        optimizer.param_groups[0]["lr"] = 0.05 * min(1.0, (1 + number) / 8)
        loss = F.cross_entropy(model(x), y)
        (loss.item(), x.std().item(), len(x), int((y == 2).sum()))
        step(model, optimizer, loss)


def restored(model: Any, optimizer: Any, loader: Any) -> None:
    best = {name: value.clone() for name, value in model.state_dict().items()}
    for x, y in batches(loader):
        step(model, optimizer, F.cross_entropy(model(x), y))
        model.load_state_dict(best)


def numpy_noise(model: Any, optimizer: Any, loader: Any) -> None:
    draw = np.random.default_rng(0)
    for x, y in batches(loader):
        noise = torch.from_numpy(draw.normal(0, 0.1, 6)).float()
        step(model, optimizer, F.cross_entropy(model(x + noise), y))


def student_on_other_data(model: Any, optimizer: Any, loader: Any) -> None:
    student = nn.Linear(6, 3)
    other = torch.optim.SGD(student.parameters(), lr=0.1)
    for x, y in batches(loader):
        step(model, optimizer, F.cross_entropy(model(x), y))
        public = torch.randn(5, 6)
        with torch.no_grad():
            wanted = model(public)
        other.zero_grad()
        F.mse_loss(student(public), wanted).backward()
        other.step()


RIGHT = (
    logged,
    clipped_and_averaged,
    annealed_temperature,
    warmed_up_by_hand,
    restored,
    numpy_noise,
    student_on_other_data,
)


@pytest.mark.parametrize("loop", RIGHT, ids=[loop.__name__ for loop in RIGHT])
@pytest.mark.parametrize("told", [False, True], ids=["nothing", "criterion"])
def test_right_loop_is_left_alone(loop: Any, told: bool) -> None:
    _, run = start(**({"criterion": F.cross_entropy} if told else {}))
    loop(*run)


def rate_in_a_line_with_the_loss(model: Any, optimizer: Any, loader: Any) -> None:
    for x, y in batches(loader):
        loss = F.cross_entropy(model(x), y)
        optimizer.param_groups[0]["lr"] = 0.01 + 0.05 * loss.item()
        step(model, optimizer, loss)


def number_further_computed_is_an_argument(model: Any, optimizer: Any, loader: Any) -> None:
    for x, y in batches(loader):
        step(model, optimizer, F.cross_entropy(model(x, by=1 + 0.3 * x.std().item()), y))


def mean_of_arrays(model: Any, optimizer: Any, loader: Any) -> None:
    for x, y in batches(loader):
        mean = torch.tensor(np.mean([row.numpy() for row in x], 0))
        step(model, optimizer, F.cross_entropy(model(x - mean), y))


def weights_of_a_list_of_counts(model: Any, optimizer: Any, loader: Any) -> None:
    for x, y in batches(loader):
        weight = torch.tensor([1.0 + 9 * y.tolist().count(2)] * 3)
        step(model, optimizer, (weight[y] * F.cross_entropy(model(x), y, reduction="none")).mean())


FURTHER = (
    rate_in_a_line_with_the_loss, number_further_computed_is_an_argument, mean_of_arrays, weights_of_a_list_of_counts
)  # fmt: skip


@pytest.mark.parametrize("loop", FURTHER, ids=[loop.__name__ for loop in FURTHER])
def test_what_is_computed_further_is_stopped_once_it_has_changed(loop: Any) -> None:
    test_way_around_is_stopped(loop, False)


def test_a_switch_that_is_a_tensor_is_seen_when_it_is_turned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpfix.training.follow.agenda.Agenda.chance", 0.0)
    _, (model, optimizer, loader) = start()
    with pytest.raises(dpfix.CoupledLossError, match="DPF014"):
        for number, (x, y) in enumerate(batches(loader)):
            weight = torch.where(torch.tensor(number >= 6), 1 + x.std(), torch.tensor(1.0))
            step(model, optimizer, F.cross_entropy(model(x), y) * weight)


def compared_with_a_copy(model: Any, optimizer: Any, loader: Any) -> None:
    """A plain copy is run on the same batch, and loaded with the model's weights before each step."""
    copied = Scaled()
    for x, y in batches(loader):
        copied.load_state_dict({n.removeprefix("_module."): v for n, v in model.state_dict().items()})
        copied.zero_grad()
        F.cross_entropy(copied(x), y).backward()
        step(model, optimizer, F.cross_entropy(model(x), y))


def test_copy_beside_the_model_is_nobodys_business() -> None:
    test_right_loop_is_left_alone(compared_with_a_copy, False)

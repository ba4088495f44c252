"""Self-supervised training: what `docs/detach.md` says about each method, one call, the source untouched."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dpfix
from tests.helpers import sgd
from tests.reference import Step, clipped_sum, gradients_one_by_one, relative_error

SAMPLES = 6


def views() -> TensorDataset:
    """Two views of every sample."""
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(SAMPLES, 6, generator=draw, dtype=torch.float64)
    return TensorDataset(*(x + 0.3 * torch.randn(x.shape, generator=draw, dtype=torch.float64) for _ in range(2)))


def start(model: nn.Module, step: Step, **arguments: Any) -> dpfix.PrivateTraining:
    return dpfix.make_private_safe(
        module=model,
        optimizer=sgd(model),
        data_loader=DataLoader(views(), batch_size=SAMPLES),
        training_step=step,
        noise_multiplier=0.0,
        max_grad_norm=0.5,
        poisson_sampling=False,
        **arguments,
    )


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()


class Centring(nn.Module):
    """Cross-entropy between the teacher's and the student's distributions; the teacher's outputs are centred."""

    def __init__(self, *, moving: bool = True) -> None:
        super().__init__()
        self.moving = moving
        self.register_buffer("center", torch.zeros(1, 4, dtype=torch.float64))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        target = F.softmax((teacher - self.center) / 0.04, dim=-1).detach()
        loss = -(target * F.log_softmax(student / 0.1, dim=-1)).sum(-1).mean()
        if self.moving:
            self.move(teacher)
        return loss

    @torch.no_grad()
    def move(self, teacher: Tensor) -> None:
        self.center = 0.9 * self.center + 0.1 * teacher.mean(0, keepdim=True)


class Dino(nn.Module):
    """Student, teacher and centre in one module."""

    def __init__(self, *, moving: bool = True) -> None:
        super().__init__()
        self.student, self.loss = encoder(), Centring(moving=moving)
        self.teacher = copy.deepcopy(self.student)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.teacher(b)
        return self.loss(self.student(a), target)

    @torch.no_grad()
    def follow(self) -> None:
        for slow, fast in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            slow.lerp_(fast, 0.1)


def own_loss(model: nn.Module, batch: Any) -> Tensor:
    return model(*batch)


def test_dino_is_refused_for_its_centre() -> None:
    with pytest.raises(dpfix.DPFixError, match=r"DPF012(.|\n)*loss\.center"):
        start(Dino(), own_loss)


class Attribute(Centring):
    """The centre is a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        del self.center
        self.center = torch.zeros(1, 4, dtype=torch.float64)


class Slow(Centring):
    """A centre that moves too slowly for any loss to show it on a probe."""

    @torch.no_grad()
    def move(self, teacher: Tensor) -> None:
        self.center.lerp_(teacher.mean(0, keepdim=True), 1e-9)


def distilled(loss: nn.Module, student: nn.Module) -> Step:
    teacher = copy.deepcopy(student)

    def step(model: nn.Module, batch: Any) -> Tensor:
        with torch.no_grad():
            target = teacher(batch[1])
        return loss(model(batch[0]), target)

    return step


@pytest.mark.parametrize("kind", [Centring, Attribute, Slow])
def test_dino_is_refused_for_a_centre_that_the_loss_keeps(kind: type[Centring]) -> None:
    """As the authors have it: the model is the student, and the loss, a module of its own, keeps the centre."""
    student, loss = encoder(), kind()
    with pytest.raises(dpfix.StateWrittenError, match=rf"DPF012.*`center` of {kind.__name__}, which is no part"):
        start(student, distilled(loss, student))
    assert not loss.center.any(), "what the probe wrote is undone"


@pytest.mark.parametrize("how", ["partial", "method", "helper"])
def test_the_centre_is_found_wherever_the_step_has_it(how: str) -> None:
    student, loss = encoder(), Slow()
    step = distilled(loss, student)

    class Trainer:
        def __init__(self) -> None:
            self.loss, self.teacher = loss, copy.deepcopy(student)

        def step(self, model: nn.Module, batch: Any) -> Tensor:
            return self.loss(model(batch[0]), self.teacher(batch[1]).detach())

    def helped(model: nn.Module, batch: Any) -> Tensor:
        return step(model, batch)

    def given(criterion: nn.Module, model: nn.Module, batch: Any) -> Tensor:
        return criterion(model(batch[0]), batch[1][:, :4])

    steps: dict[str, Step] = {
        "partial": partial(given, loss),
        "method": Trainer().step,
        "helper": helped,
    }
    with pytest.raises(dpfix.StateWrittenError, match="`center` of Slow"):
        start(student, steps[how])


def test_what_a_loss_notes_down_is_no_reason_to_refuse() -> None:
    """A value for the log that no later step reads, and a count."""

    class Noting(Centring):
        def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
            found = super().forward(student, teacher)
            self.last, self.calls = found.detach(), getattr(self, "calls", 0) + 1
            return found

    student, loss = encoder(), Noting(moving=False)
    assert start(student, distilled(loss, student)).plan.loss_known
    assert not hasattr(loss, "calls"), "what the probe wrote is undone"


def test_student_and_teacher_train_with_a_centre_that_stays() -> None:
    model = Dino(moving=False)
    plain = copy.deepcopy(model)
    training = start(model, own_loss)
    before = model.teacher[0].weight.detach().clone()
    for _ in range(2):
        plain.load_state_dict(model.state_dict())
        (batch,) = training[2]
        training[1].zero_grad()
        own_loss(training[0], batch).backward()
        training[1].step()
        samples = gradients_one_by_one(plain, own_loss, [[t[i : i + 1] for t in batch] for i in range(SAMPLES)])
        old = dict(plain.named_parameters())
        moved = {n: (old[n] - p).detach() * SAMPLES for n, p in model.named_parameters() if n.startswith("student")}
        wanted = clipped_sum(samples, 0.5)
        assert relative_error(moved, {n: wanted[n] for n in moved}) <= 1e-9
        model.follow()
    assert not torch.equal(model.teacher[0].weight, before)


def sim_clr(model: nn.Module, batch: Any) -> Tensor:
    z = F.normalize(model(torch.cat(batch)), dim=1)
    alike = (z @ z.T / 0.5).fill_diagonal_(-torch.inf)
    return F.cross_entropy(alike, torch.arange(len(z)).roll(len(z) // 2))


def vic_reg(model: nn.Module, batch: Any) -> Tensor:
    a, b = model(batch[0]), model(batch[1])
    spread = sum(F.relu(1 - (z.var(0, correction=0) + 1e-4).sqrt()).mean() for z in (a, b))
    off = [z.T.cov(correction=0) - torch.diag(z.var(0, correction=0)) for z in (a, b)]
    return 25 * F.mse_loss(a, b) + 25 * spread + sum(c.square().sum() / 4 for c in off)


def barlow_twins(model: nn.Module, batch: Any) -> Tensor:
    a, b = (((z := model(x)) - z.mean(0)) / (z.std(0, correction=0) + 1e-3) for x in batch)
    both = a.T @ b / len(a)
    return (both - torch.eye(4, dtype=both.dtype)).square().sum()


@pytest.mark.parametrize("step", [sim_clr, vic_reg, barlow_twins])
def test_losses_that_compare_the_samples_are_refused(step: Step) -> None:
    model = encoder()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(dpfix.CoupledLossError, match="DPF014"):
        start(model, step)
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())

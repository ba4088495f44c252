"""The loop's loss, where the call was not told it: followed on the first real steps, refused before a parameter moves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from monai.losses import DiceCELoss, DiceLoss, FocalLoss
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils.data import DataLoader, TensorDataset

import dpfix
from dpfix.engines import ENGINES
from dpfix.instrument.function_modes import Laid
from dpfix.training.follow.after_step import AfterStep
from dpfix.training.follow.follower import Follower as LossTrace
from tests.helpers import sgd
from tests.reference import clipped_sum, gradients_one_by_one, relative_error

Loss = Callable[[Tensor, Tensor], Tensor]

WEIGHTS = torch.tensor([1.0, 4.0, 0.5])


class Mask(nn.Module):
    """Two-channel masks of tiny images, or logits of tokens: ``[samples, 3, 4, 4]``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def labels(samples: int = 24) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    y = torch.randint(0, 3, (samples, 4, 4), generator=draw)
    y[torch.rand(y.shape, generator=draw) < 0.3] = 0
    return y


def start(**changes: Any) -> tuple[nn.Module, dpfix.PrivateTraining]:
    torch.manual_seed(0)
    model = changes.pop("model", None) or Mask()
    draw = torch.Generator().manual_seed(2)
    y = changes.pop("y", labels())
    loader = DataLoader(TensorDataset(torch.randn(len(y), 1, 4, 4, generator=draw), y), batch_size=8)
    given: dict[str, Any] = {"module": model, "optimizer": sgd(model), "data_loader": loader}
    return model, dpfix.make_private_safe(**given | {"noise_multiplier": 0.0, "max_grad_norm": 0.1} | changes)


def values(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def several(training: Any) -> Any:
    return next(batch for batch in training[2] if len(batch[0]) > 1)


def one_hot(y: Tensor) -> Tensor:
    return F.one_hot(y, 3).movedim(-1, 1).float()


def step(training: Any, loss: Loss) -> Any:
    model, optimizer, _ = training
    batch = several(training)
    optimizer.zero_grad()
    loss(model(batch[0]), batch[1]).backward()
    optimizer.step()
    return batch


# ------------------------------------------------------------------ coupled losses


def contrastive(out: Tensor, y: Tensor) -> Tensor:
    z = F.normalize(out.flatten(1), dim=1)
    return F.cross_entropy(z @ z.T / 0.5, torch.arange(len(z)))


def barlow(out: Tensor, y: Tensor) -> Tensor:
    z = out.flatten(1)
    return ((z.T @ z / len(z)) - torch.eye(z.shape[1])).square().sum()


def valid_mean(out: Tensor, y: Tensor) -> Tensor:
    valid = (y > 0).float()
    return (F.cross_entropy(out, y, reduction="none") * valid).sum() / valid.sum()


def hardest(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out, y, reduction="none").flatten().topk(10).values.mean()


def written_by_hand(out: Tensor, y: Tensor) -> Tensor:
    out -= out.mean(0)  # the loop writes into the output itself
    return F.cross_entropy(out, y)


def python_number(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out, y, ignore_index=0, reduction="sum") / int((y > 0).sum())


COUPLED: dict[str, Loss] = {
    "class weights": nn.CrossEntropyLoss(weight=WEIGHTS),
    "ignore index": nn.CrossEntropyLoss(ignore_index=0),
    "mean over the valid": valid_mean,
    "batch Dice": lambda out, y: DiceLoss(batch=True, softmax=True)(out, one_hot(y)),
    "contrastive": contrastive,
    "Barlow Twins": barlow,
    "hardest elements": hardest,
    "in place": written_by_hand,
    "a number of the batch": python_number,
}


@pytest.mark.parametrize("name", COUPLED)
def test_coupled_loss_is_refused_in_the_first_step(name: str) -> None:
    model, training = start()
    before = values(model)
    with pytest.raises(dpfix.CoupledLossError, match=r"DPF014.*test_loss_proof.py:\d+.*couples(.|\n)*PerSampleLoss"):
        step(training, COUPLED[name])
    assert torch.equal(values(model), before)
    with pytest.raises(dpfix.CoupledLossError):  # the next step is no better
        step(training, COUPLED[name])
    training[1].zero_grad()
    assert not _get_current_function_mode_stack()
    assert training[1].guard.guarded.progress.released == 0


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["class weights", "in place"])
def test_coupled_loss_is_refused_with_every_engine(engine: str, name: str) -> None:
    _, training = start(grad_sample_mode=engine)
    with pytest.raises(dpfix.CoupledLossError, match="DPF014"):
        step(training, COUPLED[name])
    training[1].zero_grad()


@pytest.mark.parametrize(("announced", "loss", "other"), [("mean", "sum", "sum"), ("sum", "mean", "mean")])
def test_other_reduction_than_announced(announced: str, loss: str, other: str) -> None:
    model, training = start(loss_reduction=announced)
    before = values(model)
    with pytest.raises(dpfix.LossError, match=f"DPF015.*is a {other}"):
        step(training, nn.CrossEntropyLoss(reduction=loss))
    assert torch.equal(values(model), before)
    training[0].to_standard_module()
    assert not _get_current_function_mode_stack()


# ------------------------------------------------------------------ right losses


def divided_by_hand(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out, y, reduction="sum") / (len(out) * 16)


def in_a_loop(out: Tensor, y: Tensor) -> Tensor:
    return torch.stack([F.cross_entropy(o[None], t[None]) for o, t in zip(out, y, strict=True)]).mean()


def scaled_and_written(out: Tensor, y: Tensor) -> Tensor:
    out *= 2
    return F.cross_entropy(out, y)


def weighted_per_sample(out: Tensor, y: Tensor) -> Tensor:
    rows = F.cross_entropy(out, y, weight=WEIGHTS, reduction="none").flatten(1).sum(1)
    return (rows / WEIGHTS[y].flatten(1).sum(1)).mean()


RIGHT: dict[str, Loss] = {
    "cross entropy": nn.CrossEntropyLoss(),
    "label smoothing": nn.CrossEntropyLoss(label_smoothing=0.1),
    "class weights per sample": weighted_per_sample,
    "divided by hand": divided_by_hand,
    "in a loop": in_a_loop,
    "in place": scaled_and_written,
    "squared error": lambda out, y: F.mse_loss(out, one_hot(y)),
    "binary": lambda out, y: F.binary_cross_entropy_with_logits(out, one_hot(y), pos_weight=torch.ones(3, 1, 1) * 2),
    "Dice": lambda out, y: DiceLoss(softmax=True)(out, one_hot(y)),
    "Dice and cross entropy": lambda out, y: DiceCELoss(softmax=True)(out, one_hot(y)),
    "focal": lambda out, y: FocalLoss()(out, one_hot(y)),
    "per sample, vectorised": dpfix.PerSampleLoss(nn.CrossEntropyLoss(weight=WEIGHTS)),
    "per sample, in a loop": dpfix.PerSampleLoss(lambda out, y: F.cross_entropy(out, y) if float(out.sum()) else out.sum()),
    "scaled": lambda out, y: F.cross_entropy(out, y) * 1024,
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_loss_without_coupling_trains_and_releases_the_clipped_sum(name: str) -> None:
    model, training = start(loss_reduction="mean")
    for _ in range(4):  # the proof ends after three
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        reference = Mask()
        reference.load_state_dict(model.state_dict())
        x, y = step(training, RIGHT[name])
        singles = [(x[i : i + 1], y[i : i + 1]) for i in range(len(x))]
        alone = gradients_one_by_one(reference, lambda m, b: RIGHT[name](m(b[0]), b[1]), singles)
        if name == "divided by hand":
            assert len(x) * 16 != 16  # alone, the sample divides by itself
        wanted = clipped_sum(alone, 0.1)
        moved = {n: (before[n] - p.detach()) * training[1].expected_batch_size for n, p in model.named_parameters()}
        assert relative_error(moved, wanted) <= 1e-3


def test_looking_at_what_follows_a_step_ends_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpfix.training.follow.after_step.MOST_AFTER", 200)
    _, training = start()
    x, _ = step(training, nn.CrossEntropyLoss())
    (looking,) = on()
    assert isinstance(looking, AfterStep)
    assert not looking.over
    for _ in range(200):
        torch.add(x, 1)
    assert looking.over
    start()
    assert not _get_current_function_mode_stack()


@pytest.mark.parametrize("engine", ENGINES)
def test_loop_may_write_into_the_output_with_every_engine(engine: str) -> None:
    _, training = start(grad_sample_mode=engine)
    x, y = step(training, scaled_and_written)
    assert len(x) == len(y) > 1 and training.get_epsilon(1e-3) == float("inf")


def test_nothing_of_the_proof_is_left_after_a_step_and_after_training() -> None:
    model, training = start()
    for _ in range(4):
        step(training, nn.CrossEntropyLoss())
        assert traces_on() == 0
        assert all(isinstance(mode, AfterStep) for mode in on())
    training[0].to_standard_module()
    assert not _get_current_function_mode_stack()
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_mode_of_the_script_around_the_loss_is_left_alone() -> None:
    _, training = start()
    batch = several(training)
    training[1].zero_grad()
    out = training[0](batch[0])
    with torch.device("cpu"):
        F.cross_entropy(out, batch[1]).backward()
        assert len(_get_current_function_mode_stack()) >= 1
    training[1].step()
    training[1].zero_grad()
    assert not others()


def test_evaluation_between_steps_is_not_followed() -> None:
    _, training = start()
    step(training, nn.CrossEntropyLoss())
    with torch.no_grad():
        contrastive(training[0](torch.randn(5, 1, 4, 4)), labels(5))
    step(training, nn.CrossEntropyLoss())


class Scaled(Mask):
    """The model itself has a parameter, so that Opacus's hooks are on the model, too."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")  # torch says so of Opacus's hook
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("wrap", [True, False])
def test_model_with_parameters_of_its_own(engine: str, wrap: bool) -> None:
    model, training = start(model=Scaled(), grad_sample_mode=engine, wrap_model=wrap)
    reference = Scaled()
    for _ in range(3):
        reference.load_state_dict(model.state_dict())
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        _, optimizer, loader = training
        x, y = next(batch for batch in loader if len(batch[0]) > 1)
        optimizer.zero_grad()
        F.cross_entropy((training[0] if wrap else model)(x), y).backward()
        optimizer.step()
        singles = [(x[i : i + 1], y[i : i + 1]) for i in range(len(x))]
        alone = gradients_one_by_one(reference, lambda m, b: F.cross_entropy(m(b[0]), b[1]), singles)
        moved = {n: (before[n] - p.detach()) * optimizer.expected_batch_size for n, p in model.named_parameters()}
        assert relative_error(moved, clipped_sum(alone, 0.1)) <= 1e-3


# ------------------------------------------------------------------ what cannot be followed is said


class Custom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return -g  # gradient reversal: its forward does not tell


NOT_FOLLOWED: dict[str, tuple[Loss, str]] = {
    "a function of its own": (lambda out, y: F.cross_entropy(Custom.apply(out), y), "custom autograd.Function"),
}


@pytest.mark.parametrize("name", NOT_FOLLOWED)
def test_loss_that_cannot_be_followed_is_named(name: str) -> None:
    _, training = start()
    loss, why = NOT_FOLLOWED[name]
    with pytest.warns(dpfix.DPFixWarning, match=f"could not be followed.*({why})(.|\n)*criterion="):
        step(training, loss)
    step(training, loss)  # once is enough


def test_gradients_taken_by_another_function_are_named() -> None:
    _, training = start()
    x, y = several(training)
    training[1].zero_grad()
    torch.autograd.backward([F.cross_entropy(training[0](x), y)])
    with pytest.warns(dpfix.DPFixWarning, match="could not be followed"):
        training[1].step()


def traces_on() -> int:
    return sum(isinstance(mode, LossTrace) for mode in on())


def others() -> list[Any]:
    """What lies on the functions but the one that looks at what follows a step."""
    return [mode for mode in on() if not isinstance(mode, AfterStep)]


def on() -> list[Any]:
    """The function modes that are on."""
    return [mode.mode() if isinstance(mode, Laid) else mode for mode in _get_current_function_mode_stack()]


def test_trainings_that_are_left_in_the_middle_of_a_step_leave_nothing_on() -> None:
    """Setting up anew after a forward pass, as in a notebook: what the first one follows ends with the second."""
    for _ in range(3):
        _, training = start()
        private, optimizer, _ = training
        x, y = several(training)
        out = private(x)
        assert traces_on() == 1
    optimizer.zero_grad()
    F.cross_entropy(private(x), y).backward()
    optimizer.step()
    assert traces_on() == 0
    assert out.shape == private(x).shape


def test_a_refused_loss_leaves_nothing_on() -> None:
    _, training = start()
    private, optimizer, _ = training
    x, _ = several(training)
    loss = private(x).var(0).sum()
    with pytest.raises(dpfix.CoupledLossError):
        loss.backward()
    optimizer.zero_grad()
    assert traces_on() == 0


class Mode(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("cpu")
    try:
        yield
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("mode", [Mode, lambda: torch.device("cpu"), default_device], ids=["mode", "device", "default"])
@pytest.mark.parametrize("poisson", [True, False])
def test_a_mode_that_the_script_takes_off_is_taken_off(mode: Callable[[], Any], poisson: bool) -> None:
    """Following begins within the block, and goes on when the block ends."""
    _, training = start(poisson_sampling=poisson)
    private, optimizer, loader = training
    with mode():
        x, y = next((x, y) for x, y in loader if len(x) > 1)
        out = private(x)
    (follower,) = on()
    assert isinstance(follower, LossTrace)
    F.cross_entropy(out, y).backward()
    optimizer.step()
    optimizer.zero_grad()
    with mode():
        x, _ = next((x, y) for x, y in loader if len(x) > 1)
        out = private(x)
    with pytest.raises(dpfix.CoupledLossError):
        (out.var(0).sum()).backward()
    optimizer.zero_grad()
    assert not _get_current_function_mode_stack()


def test_modes_of_the_script_keep_their_places() -> None:
    _, training = start()
    private, optimizer, _ = training
    x, y = several(training)
    loss = F.cross_entropy(private(x), y)
    with Mode() as mine:
        loss.backward()
        optimizer.step()
        assert others() == [mine]
    assert not others()


def test_a_loop_without_backward_is_not_followed_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpfix.training.follow.follower.MOST_CALLS", 50)
    _, training = start()
    x, _ = several(training)
    out = training[0](x)
    for _ in range(60):
        out = out + 1
    (trace,) = on()
    assert isinstance(trace, LossTrace)
    assert not trace.calls
    assert "backward() was not called" in trace.broken
    start()
    assert traces_on() == 0

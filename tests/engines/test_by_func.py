"""Per-sample gradients for scripts that compute them themselves, against batches of one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import DataLoader, TensorDataset

import dpfix
from tests.helpers import sgd
from tests.reference import gradients_one_by_one

SAMPLES = 6


class Attentive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 4, padding_idx=0), nn.Linear(4, 3)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, ids: Tensor, *, scale: Tensor) -> dict[str, Any]:
        x = self.embed(ids)
        hidden, _ = self.attention(x, x, x)
        hidden += 1.0  # in place
        return {"logits": self.head(hidden[:, -1]) * scale, "more": (hidden,)}


def attentive_step(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["ids"], scale=batch["scale"])["logits"], batch["y"])


def attentive() -> tuple[nn.Module, Any, Any]:
    batch = {
        "ids": torch.randint(0, 11, (SAMPLES, 7)),
        "scale": torch.tensor(0.5, dtype=torch.float64),
        "y": torch.arange(SAMPLES) % 3,
        "name": "kept",
    }
    return Attentive().double(), attentive_step, batch


def classified(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def images() -> tuple[nn.Module, Any, Any]:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, 3)
    )
    model[1].requires_grad_(False)
    x = torch.randn(SAMPLES, 2, 8, 8, dtype=torch.float64)
    return model.double(), classified, (x, torch.arange(SAMPLES) % 3)


def one(batch: Any, i: int) -> Any:
    if isinstance(batch, dict):
        return {k: v[i : i + 1] if isinstance(v, Tensor) and v.dim() else v for k, v in batch.items()}
    return tuple(t[i : i + 1] for t in batch)


@pytest.mark.parametrize("build", [attentive, images])
@pytest.mark.parametrize("how", [{}, {"memory": 1}, {"vectorized": False}])
def test_they_are_those_of_batches_of_one(build: Any, how: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, step, batch = build()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    found = dpfix.per_sample_gradients(model, step, batch, **how)
    wanted = gradients_one_by_one(model, step, [one(batch, i) for i in range(SAMPLES)])
    assert found.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, gradients in found.items():
        torch.testing.assert_close(gradients, torch.stack([g[name] for g in wanted]), rtol=1e-9, atol=1e-12)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_rows_of_a_sample_are_averaged() -> None:
    torch.manual_seed(0)
    model, step, (x, y) = images()
    found = dpfix.per_sample_gradients(model, step, (x, y), rows=3)
    wanted = gradients_one_by_one(model, step, [(x[i : i + 3], y[i : i + 3]) for i in (0, 3)])
    for name, gradients in found.items():
        torch.testing.assert_close(gradients, torch.stack([g[name] for g in wanted]), rtol=1e-9, atol=1e-12)


def test_dropout_draws_anew_for_every_sample() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 1))
    x = torch.ones(SAMPLES, 64)
    found = dpfix.per_sample_gradients(model, lambda m, b: m(b).mean(), x)
    assert len({tuple(row.tolist()) for row in found["1.weight"].flatten(1)}) == SAMPLES


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(3), Branch()])
def test_what_vmap_cannot_follow_is_said(layer: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), layer, nn.Flatten(), nn.Linear(12, 3))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(dpfix.ModelError, match=r"cannot follow the training step of Sequential[\s\S]*vectorized=False"):
        dpfix.per_sample_gradients(model, classified, (torch.randn(SAMPLES, 2, 4, 4), torch.arange(SAMPLES) % 3))
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


@pytest.mark.parametrize(("batch", "rows"), [((), 1), ((torch.zeros(5, 2),), 2), ((torch.zeros(4, 2),), 0)])
def test_batches_are_checked(batch: Any, rows: int) -> None:
    with pytest.raises(dpfix.ArgumentError, match="not rows="):
        dpfix.per_sample_gradients(nn.Linear(2, 1), lambda m, b: m(b[0]).sum(), batch, rows=rows)


# ------------------------------------------------------------------ the loop of Opacus issue #626


VIEWS = 4


def views(x: Tensor) -> Tensor:
    """Several views of every sample, in a dimension of their own."""
    return torch.stack([x, x.flip(-1), x * 0.9, x + 0.1], 1)


def by_torch_func(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Average the gradients of a sample's views and leave them where the optimizer looks."""
    parameters = {n: p.detach() for n, p in model.named_parameters()}

    def loss(parameters: Any, rows: Tensor, label: Tensor) -> Tensor:
        out = functional_call(model, parameters, (rows,))
        return F.cross_entropy(out, label.expand(len(rows)))

    found = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, views(x), y)
    for name, p in model.named_parameters():
        p.grad_sample = found[name]  # type: ignore[attr-defined]


def by_dpfix(model: nn.Module, x: Tensor, y: Tensor) -> None:
    found = dpfix.per_sample_gradients(
        model, classified, (views(x).flatten(0, 1), y.repeat_interleave(VIEWS)), rows=VIEWS
    )
    for name, p in model.named_parameters():
        p.grad_sample = found[name]  # type: ignore[attr-defined]


def trained_by_hand(fill: Any) -> Any:
    torch.manual_seed(0)
    model, _, (x, y) = images()
    model.requires_grad_(True)
    training = dpfix.make_private_safe(
        module=model, optimizer=sgd(model, 0.5), data_loader=DataLoader(TensorDataset(x, y), batch_size=3),
        noise_multiplier=0.5, max_grad_norm=0.1, criterion=nn.CrossEntropyLoss(), grad_sample_mode="no_op",
        seed=1,
    )  # fmt: skip
    private, optimizer, loader = training
    for _ in range(3):
        for a, b in loader:
            optimizer.zero_grad()
            fill(private, a, b)
            optimizer.step()
    return training, model


def test_the_loop_of_issue_626_works_unchanged() -> None:
    (training, by_func), (other, by_us) = trained_by_hand(by_torch_func), trained_by_hand(by_dpfix)
    assert training.privacy_engine.accountant.history == other.privacy_engine.accountant.history
    assert training.privacy_engine.accountant.history[0][-1] == 6
    for a, b in zip(by_func.parameters(), by_us.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_rows_that_are_no_samples_are_refused_there_too() -> None:
    def every_view_as_a_sample(model: nn.Module, x: Tensor, y: Tensor) -> None:
        rows = (views(x).flatten(0, 1), y.repeat_interleave(VIEWS))
        for name, g in dpfix.per_sample_gradients(model, classified, rows).items():
            model.get_parameter(name).grad_sample = g  # type: ignore[assignment]

    with pytest.raises(dpfix.ForeignBatchError, match="samples, but the data_loader drew"):
        trained_by_hand(every_view_as_a_sample)


def test_a_loop_of_torch_func_on_another_engine_is_told_how() -> None:
    torch.manual_seed(0)
    model, _, (x, y) = images()
    model.requires_grad_(True)
    private, optimizer, loader = dpfix.make_private_safe(
        module=model, optimizer=sgd(model, 0.5), data_loader=DataLoader(TensorDataset(x, y), batch_size=6),
        noise_multiplier=0.5, max_grad_norm=0.1, criterion=nn.CrossEntropyLoss(),
    )  # fmt: skip
    a, b = next(iter(loader))
    optimizer.zero_grad()
    by_torch_func(private, a, b)
    with pytest.raises(dpfix.MisuseError, match=r"no_op.*functional_call.*make_functional"):
        optimizer.step()


def test_hooks_say_which_mode_a_loop_of_its_own_needs() -> None:
    model, _, (x, y) = images()
    model.requires_grad_(True)
    private, *_ = dpfix.make_private_safe(
        module=model, optimizer=sgd(model, 0.5), data_loader=DataLoader(TensorDataset(x, y), batch_size=3),
        noise_multiplier=0.5, max_grad_norm=0.1, criterion=nn.CrossEntropyLoss(), grad_sample_mode="hooks",
    )  # fmt: skip
    with pytest.raises(
        dpfix.MisuseError, match=r"Pass grad_sample_mode='no_op' if the loop computes per-sample gradients"
    ):
        dpfix.per_sample_gradients(private, classified, (x, y))


def test_buffers_are_not_written_one_sample_after_another_either() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    before = copy.deepcopy(model.state_dict())
    batch = (torch.randn(8, 4), torch.arange(8) % 3)
    dpfix.per_sample_gradients(model, lambda m, b: F.cross_entropy(m(b[0]), b[1]), batch, rows=2, vectorized=False)
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())

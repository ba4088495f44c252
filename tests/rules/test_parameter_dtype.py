"""Trainable bfloat16 parameters become float32; the model computes in bfloat16 as before, and its export is of bfloat16."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dpfix
from tests.helpers import points, setting, sgd, train, untold
from tests.reference import clip_norms, clipped_sum, gradients_one_by_one, norm, relative_error

HALF = 5e-2
"""Relative error that is rounding in bfloat16."""
SAMPLES = 8


class Block(nn.Module):
    """Attention and a feed-forward network, as language models have them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(self.first(x)).view(n, t, 3, 2, d // 2).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, t, d))
        return x + self.down(F.gelu(self.up(self.second(x))))


class Words(nn.Module):
    """A small language model with positions of its own, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(20, 16), nn.Parameter(0.1 * torch.randn(1, 6, 16))
        self.blocks = nn.ModuleList([Block(16), Block(16)])
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class Series(nn.Module):
    """A recurrent classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3))


def cnn() -> nn.Module:
    convolutions = (nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(4, 8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(128, 3))


@dataclass(frozen=True)
class Kind:
    """A model, its inputs, and the engines that take it."""

    make: Callable[[], nn.Module]
    draw: Callable[[int], Tensor]
    modes: tuple[str, ...] = ("auto", "bookkeeping", "vmap", "hooks", "functorch", "microbatch")


KINDS = {
    "mlp": Kind(mlp, lambda n: torch.randn(n, 6)),
    "cnn": Kind(cnn, lambda n: torch.randn(n, 1, 6, 6)),
    "words": Kind(Words, lambda n: torch.randint(0, 20, (n, 6))),
    "series": Kind(Series, lambda n: torch.randn(n, 5, 4), ("auto", "bookkeeping", "microbatch")),
}
ways = pytest.mark.parametrize(
    ("kind", "mode"),
    [pytest.param(kind, mode, id=f"{name}-{mode}") for name, kind in KINDS.items() for mode in kind.modes],
)


def converted(x: Tensor) -> Tensor:
    return x.bfloat16() if x.is_floating_point() else x


def step(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(converted(batch[0])), batch[1])


def under_autocast(model: nn.Module, batch: Any) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        out = model(converted(batch[0]))
    return F.cross_entropy(out, batch[1])


def half(model: nn.Module | None = None) -> nn.Module:
    return (mlp() if model is None else model).bfloat16()


def make(kind: Kind, mode: str, batch_size: int, **changes: Any) -> tuple[nn.Module, dpfix.PrivateTraining, list[Any]]:
    """A private training in which nothing is told, without noise; its model, and its samples."""
    model, x, y = half(kind.make()), kind.draw(SAMPLES), torch.arange(SAMPLES) % 3
    return model, *untold(model, (x, y), batch_size, grad_sample_mode=mode, **changes)


@ways
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # functorch, of attention
def test_the_clipped_sum_is_that_of_batches_of_one(kind: Kind, mode: str) -> None:
    model, training, singles = make(kind, mode, SAMPLES)
    private, optimizer, loader = training
    plain = kind.make()
    plain.load_state_dict(model.state_dict())
    alone = gradients_one_by_one(plain, under_autocast, singles)
    before = gradients_one_by_one(copy.deepcopy(plain).bfloat16(), step, singles)
    assert {g.dtype for gradients in before for g in gradients.values()} == {torch.bfloat16}
    for clip_norm in clip_norms(alone).values():
        model.load_state_dict(plain.state_dict())
        optimizer.max_grad_norm = clip_norm
        for batch in loader:
            optimizer.zero_grad()
            step(private, batch).backward()
            optimizer.step()
        moved = {
            n: (p - q).detach() * SAMPLES
            for (n, p), q in zip(plain.named_parameters(), model.parameters(), strict=True)
        }
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert relative_error(moved, clipped_sum(alone, clip_norm)) < HALF
        assert relative_error(moved, clipped_sum(before, clip_norm)) < HALF  # it computes what it did before


@ways
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # functorch, of attention
def test_no_sample_moves_it_by_more_than_the_clip_norm(kind: Kind, mode: str) -> None:
    """Norms of rounded gradients, or clip factors that are rounded, would let one through that is 0.6 % too large."""
    model, (private, optimizer, loader), _ = make(kind, mode, 1, max_grad_norm=1e-3)
    for batch in loader:
        before = [p.detach().double() for p in model.parameters()]
        optimizer.zero_grad()
        step(private, batch).backward()
        optimizer.step()
        moved = {str(n): p.detach() - q for n, (p, q) in enumerate(zip(model.parameters(), before, strict=True))}
        assert norm(moved) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("mode", KINDS["mlp"].modes)
def test_the_noise_is_that_of_single_precision(mode: str) -> None:
    model = half(nn.Sequential(nn.Linear(6, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 3)))
    loader = DataLoader(points(), batch_size=8)
    given = {"optimizer": sgd(model), "data_loader": loader, "noise_multiplier": 3.0, "max_grad_norm": 0.01}
    private, optimizer, batches = dpfix.make_private_safe(module=model, **given, grad_sample_mode=mode)
    before = [p.detach().clone() for p in model.parameters()]
    x, y = next(iter(batches))
    F.cross_entropy(private(x.bfloat16()), y).backward()
    optimizer.step()
    noise = 8 * torch.cat([(p - q).detach().flatten() for p, q in zip(model.parameters(), before, strict=True)])
    assert float(noise.std()) == pytest.approx(0.03, rel=0.03)
    steps = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert float((steps != steps.bfloat16()).float().mean()) > 0.9, "the parameters are still rounded"


def test_epsilon_is_that_of_a_model_in_single_precision() -> None:
    found = []
    for model in (mlp(), half()):
        training = dpfix.make_private_safe(**setting(model, criterion=None))
        train(training, 4, lambda out, y: F.cross_entropy(out.float(), y))
        found.append(training.get_epsilon(1e-5))
    assert found[0] == found[1] > 0


def test_the_report_says_it() -> None:
    training = dpfix.make_private_safe(**setting(half()))
    (finding,) = training.report.repairs
    assert finding.code == "DPF009" and "`0.weight` of Sequential and 3 more are torch.bfloat16" in finding.fact
    assert "computed in bfloat16 too" not in finding.fix
    mixed = nn.Sequential(half(nn.Linear(6, 4)), nn.Linear(4, 3))
    (finding,) = dpfix.make_private_safe(**setting(mixed)).report.repairs
    assert "`1.weight`" in finding.fix and "computed in bfloat16 too" in finding.fix


def test_frozen_parameters_stay_in_half_precision() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).bfloat16()
    model[0].requires_grad_(False)
    private, *_ = training = dpfix.make_private_safe(**setting(model, optimizer=sgd(model)))
    assert [p.dtype for p in model.parameters()] == [torch.bfloat16] * 2 + [torch.float32] * 2
    train(training, 3, F.cross_entropy)
    exported = dpfix.export_plain(private)
    assert {p.dtype for p in exported.parameters()} == {torch.bfloat16}
    assert [p.requires_grad for p in exported.parameters()] == [False, False, True, True]


def test_the_standard_module_stays_repaired() -> None:
    """It is the script's own object, whose trained values and optimizer are in single precision."""
    model = half()
    training = dpfix.make_private_safe(**setting(model))
    train(training, 1)
    plain, x = training[0].to_standard_module(), torch.randn(4, 6).bfloat16()
    assert plain is model and model(x).dtype is torch.bfloat16
    training[1].original_optimizer.zero_grad()
    F.cross_entropy(model(x), torch.arange(4) % 3).backward()
    training[1].original_optimizer.step()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    again = dpfix.make_private_safe(**setting(model))
    assert not again.report.repairs
    train(again, 1)
    assert {p.dtype for p in dpfix.export_plain(model).parameters()} == {torch.bfloat16}


def test_lazy_parameters_are_converted_once_they_exist() -> None:
    model = nn.Sequential(nn.LazyLinear(8, dtype=torch.bfloat16), nn.ReLU(), nn.Linear(8, 3, dtype=torch.bfloat16))
    loader = DataLoader(TensorDataset(points().tensors[0].bfloat16(), points().tensors[1]), batch_size=8)
    training = dpfix.make_private_safe(**setting(model, data_loader=loader))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    train(training, 2)


@pytest.mark.parametrize("last", [nn.Linear(32, 3), nn.LayerNorm(32)], ids=["product", "normalisation"])
def test_a_loss_in_half_precision(last: nn.Module) -> None:
    model = half(nn.Sequential(nn.Linear(6, 32), nn.ReLU(), last))
    training = dpfix.make_private_safe(**setting(model, criterion=None))
    before = copy.deepcopy(model.state_dict())
    train(training, 3, lambda out, y: F.mse_loss(out, torch.zeros_like(out).bfloat16()).bfloat16())
    assert all(not torch.equal(before[n], p) for n, p in model.named_parameters())


def adam_after_a_step(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    step(model, points()[:4]).backward()
    optimizer.step()
    return optimizer


def test_the_state_of_the_optimizer_follows() -> None:
    model = half()
    optimizer = adam_after_a_step(model)
    optimizer.zero_grad()
    held = {n: copy.deepcopy(optimizer.state[p]) for n, p in model.named_parameters()}
    training = dpfix.make_private_safe(**setting(model, optimizer=optimizer))
    for name, p in model.named_parameters():
        now = optimizer.state[p]
        assert now["exp_avg"].dtype is now["exp_avg_sq"].dtype is torch.float32
        assert torch.equal(now["exp_avg"], held[name]["exp_avg"].float()) and torch.equal(
            now["step"], held[name]["step"]
        )
    train(training, 2, F.cross_entropy)


class MeanOfBatch(nn.Module):
    """Mixes the samples."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


def test_a_refusal_leaves_everything_as_it_was() -> None:
    model = half(nn.Sequential(nn.Linear(6, 8), MeanOfBatch(), nn.Linear(8, 3)))
    loader = DataLoader(TensorDataset(points().tensors[0].bfloat16(), points().tensors[1]), batch_size=8)
    optimizer = adam_after_a_step(model)
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    objects, grads = [id(p) for p in model.parameters()], [p.grad for p in model.parameters()]
    copies = [g.clone() for g in grads if g is not None]
    with pytest.raises(dpfix.CoupledModelError):
        dpfix.make_private_safe(**setting(model, optimizer=optimizer, data_loader=loader))
    assert type(model) is nn.Sequential and [id(p) for p in model.parameters()] == objects
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(copies, grads, strict=True))  # type: ignore[arg-type]
    torch.testing.assert_close((model.state_dict(), optimizer.state_dict()), state, rtol=0, atol=0)
    step(model, points()[:4]).backward()
    optimizer.step()


def test_copies_and_pickles_compute_the_same() -> None:
    model = half()
    training = dpfix.make_private_safe(**setting(model))
    train(training, 2)
    x = torch.randn(4, 6).bfloat16()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False), copy.deepcopy(training[0])):
        assert torch.equal(other(x), model(x)) and other(x).dtype is torch.bfloat16
        assert {p.dtype for p in other.parameters()} == {torch.float32}


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # functorch, of attention
@pytest.mark.parametrize("mode", ["bookkeeping", "hooks"])
def test_an_export_is_the_model_as_it_was_built(mode: str) -> None:
    model = half(Words())
    loader = DataLoader(TensorDataset(torch.randint(0, 20, (24, 6)), torch.arange(24) % 3), batch_size=8)
    training = dpfix.make_private_safe(**setting(model, data_loader=loader, grad_sample_mode=mode))
    train(training, 2)
    exported, original = dpfix.export_plain(training[0]), half(Words())
    assert type(exported) is Words and not dpfix.changed_layers(model)
    assert {p.dtype for p in exported.parameters()} == {torch.bfloat16}
    original.load_state_dict(exported.state_dict())
    ids = torch.randint(0, 20, (4, 6))
    assert torch.equal(exported(ids), original(ids)) and exported(ids).dtype is torch.bfloat16
    assert {v.dtype for v in dpfix.plain_state_dict(model).values()} == {torch.bfloat16}
    for n, p in model.named_parameters():
        assert torch.equal(exported.state_dict()[n], p.bfloat16())
    torch.testing.assert_close(exported(ids), model(ids).to(exported(ids)), rtol=HALF, atol=HALF)


class Attention(nn.Module):
    """A layer that works inside fused kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(1)
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


def test_attention_is_exported() -> None:
    model = half(Attention())
    training = dpfix.make_private_safe(**setting(model))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    train(training, 2)
    exported, original = dpfix.export_plain(model), half(Attention())
    assert {p.dtype for p in exported.parameters()} == {torch.bfloat16}
    original.load_state_dict(exported.state_dict())
    x = torch.randn(4, 6).bfloat16()
    assert torch.equal(exported(x), original(x))


def test_weights_in_half_precision_can_be_loaded() -> None:
    model, other = half(), half()
    training = dpfix.make_private_safe(**setting(model))
    dpfix.load_pretrained(training[0], other.state_dict())
    assert all(torch.equal(model.state_dict()[n], v.float()) for n, v in other.state_dict().items())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    train(training, 1)


def test_a_training_is_resumed_to_the_last_bit(tmp_path: Path) -> None:
    def start() -> tuple[nn.Module, dpfix.PrivateTraining]:
        torch.manual_seed(5)
        model = half()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        given = setting(model, optimizer=optimizer, grad_sample_mode="bookkeeping", seed=1)
        return model, dpfix.make_private_safe(**given)

    def objects(training: dpfix.PrivateTraining) -> dict[str, Any]:
        return dict(zip(("module", "optimizer", "data_loader"), training, strict=False))

    model, training = start()
    train(training, 3)
    training.privacy_engine.save_checkpoint(path=tmp_path / "run.pt", **objects(training))
    train(training, 3)
    again, resumed = start()
    resumed.privacy_engine.load_checkpoint(path=tmp_path / "run.pt", **objects(resumed))
    train(resumed, 3)
    assert resumed.get_epsilon(1e-5) == training.get_epsilon(1e-5)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))

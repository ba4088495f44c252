"""Small things that many tests need."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dpfix
from tests import reference
from tests.cases import SAMPLES, Case, mlp

Setting = dict[str, Any]


def sgd(model: nn.Module, lr: float = 1.0) -> torch.optim.SGD:
    """Plain gradient descent over the trainable parameters."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)


def points(samples: int = 24, features: int = 6) -> TensorDataset:
    """A small classification dataset."""
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(samples, features, generator=draw)
    return TensorDataset(x, torch.randint(0, 3, (samples,), generator=draw))


def setting(model: nn.Module | None = None, **changes: Any) -> Setting:
    """Keyword arguments of a call that works; ``changes`` replace or add some."""
    model = mlp() if model is None else model
    given: Setting = {
        "module": model,
        "noise_multiplier": 1.0,
        "max_grad_norm": 1.0,
        "criterion": nn.CrossEntropyLoss(),
    }
    given |= changes
    if "optimizer" not in given:
        given["optimizer"] = sgd(model, 0.1)
    if "data_loader" not in given:
        given["data_loader"] = DataLoader(points(), batch_size=8)
    return given


def untold(
    model: nn.Module, samples: tuple[Tensor, Tensor], batch_size: int, **changes: Any
) -> tuple[dpfix.PrivateTraining, list[Any]]:
    """A private training in which nothing is told, without noise and sampling, and the batches of one of its samples."""
    arguments: Setting = {
        "optimizer": sgd(model),
        "data_loader": DataLoader(TensorDataset(*samples), batch_size=batch_size),
        "noise_multiplier": 0.0,
        "max_grad_norm": 1.0,
        "poisson_sampling": False,
    }
    training = dpfix.make_private_safe(module=model, **(arguments | changes))
    return training, list(zip(*(t.split(1) for t in samples), strict=True))


def private(case: Case, dtype: torch.dtype = torch.float64, **changes: Any) -> tuple[nn.Module, dpfix.PrivateTraining]:
    """The model of a case, and its private training without noise and sampling, lr 1."""
    model = case.build(dtype)
    arguments: Setting = {
        "optimizer": sgd(model),
        "data_loader": case.loader(dtype),
        "noise_multiplier": 0.0,
        "max_grad_norm": 1.0,
        "poisson_sampling": False,
        "training_step": case.step,
        "loss_reduction": case.loss_reduction,
    }
    return model, dpfix.make_private_safe(module=model, **(arguments | changes))


def released(case: Case, model: nn.Module, training: dpfix.PrivateTraining, clip_norm: float) -> dict[str, Tensor]:
    """What one step of a private training without noise moves, times the expected batch size; the move is undone."""
    stepping, optimizer, loader = training
    if not isinstance(stepping, nn.Module):  # wrap_model=False returns Opacus's hooks; the loop keeps its own model
        stepping = model
    optimizer.max_grad_norm = clip_norm
    before = {n: p.detach().clone() for n, p in model.state_dict().items()}
    for batch in loader:
        optimizer.zero_grad()
        case.step(stepping, batch).backward()
        optimizer.step()
    scale = SAMPLES if case.loss_reduction == "mean" else 1
    moved = {n: (before[n] - p.detach()) * scale for n, p in model.state_dict().items() if p.is_floating_point()}
    model.load_state_dict(before)
    return moved


def one_step(model: nn.Module, x: Tensor, y: Tensor, **changes: Any) -> tuple[float, dpfix.PrivateTraining]:
    """The error of what one private step on a model releases, against batches of one on a copy made before, and the training."""
    model.train()
    plain, clip_norm = copy.deepcopy(model), changes.pop("max_grad_norm", 0.5)
    arguments = {"noise_multiplier": 0.0, "poisson_sampling": False, "cache": False, "max_grad_norm": clip_norm}
    arguments |= {"optimizer": sgd(model), "data_loader": DataLoader(TensorDataset(x, y), batch_size=len(x))}
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    training = dpfix.make_private_safe(**setting(model, **(arguments | changes)))
    train(training, 1)

    def step(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    singles = [(x[i : i + 1], y[i : i + 1]) for i in range(len(x))]
    wanted = reference.clipped_sum(reference.gradients_one_by_one(plain, step, singles), clip_norm)
    now = dict(model.named_parameters())
    return reference.relative_error({n: (p - now[n].detach()) * len(x) for n, p in before.items()}, wanted), training


def train(training: Any, steps: int, criterion: Callable[..., Tensor] = F.cross_entropy) -> int:
    """The usual loop over ``(x, y)`` batches.

    Returns:
        The number of steps made.
    """
    model, optimizer, loader = training
    made = 0
    while made < steps:
        for x, y in loader:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
            made += 1
            if made == steps:
                break
    return made


@contextmanager
def generators_unchanged() -> Iterator[None]:
    """Python's, NumPy's and torch's generators are afterwards bit-identical to before."""
    before = generator_states()
    yield
    assert_same_generators(before)


def generator_states() -> tuple[Any, Any, Tensor]:
    """The states of all three generators."""
    import random

    import numpy as np

    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def assert_same_generators(before: tuple[Any, Any, Tensor]) -> None:
    """The generators are as they were."""
    assert same_generators(before)


def same_generators(before: tuple[Any, Any, Tensor]) -> bool:
    python, numpy, cpu = generator_states()
    same_numpy = numpy[0] == before[1][0] and bool((numpy[1] == before[1][1]).all()) and numpy[2:] == before[1][2:]
    return python == before[0] and same_numpy and torch.equal(cpu, before[2])

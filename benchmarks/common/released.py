"""The sum that a private optimizer releases, and the one that it should be."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.common.libraries import Step
from dpfix.sampling.poisson import PoissonSampler
from dpfix.sampling.randomness import Stream
from dpfix.sampling.ranks import new_seed

Gradients = dict[str, Tensor]


def released(
    model: nn.Module, optimizer: Any, loss: Step, batch: Any, clip_norm: float, *, mean: bool = True
) -> Gradients:
    """The sum that the private optimizer would release for a batch, by name of the parameter.

    Args:
        model: the private model.
        optimizer: the private optimizer, without noise.
        loss: from model and batch to the loss.
        batch: the batch.
        clip_norm: the clip norm.
        mean: whether the loss is a mean over the samples.

    Returns:
        The sum; without parameters that got no gradient.
    """
    optimizer.max_grad_norm = clip_norm
    optimizer.zero_grad()
    loss(model, batch).backward()
    optimizer.pre_step()
    scale = optimizer.expected_batch_size if mean else 1
    named = model.named_parameters()
    return {
        n.removeprefix("_module."): p.grad.detach() * scale for n, p in named if p.requires_grad and p.grad is not None
    }


def gradient(model: nn.Module, loss: Step, batch: Any) -> Gradients:
    """The gradient of the loss by ordinary autograd.

    Args:
        model: a model with nothing private on it.
        loss: from model and batch to the loss.
        batch: the batch; of one sample.

    Returns:
        The gradient by name of the parameter.
    """
    model.zero_grad()
    loss(model, batch).backward()
    return {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}


def clipped_sum(singles: Iterable[Gradients], clip_norm: float) -> Gradients:
    """``sum_i min(1, C / (|g_i| + 1e-6)) g_i``; Opacus's optimizer adds the 1e-6.

    Args:
        singles: gradients of single samples.
        clip_norm: C.

    Returns:
        The sum in double precision.
    """
    total: Gradients = {}
    for found in singles:
        factor = min(1.0, clip_norm / (norm(found) + 1e-6))
        for name, g in found.items():
            total[name] = total.get(name, torch.zeros((), dtype=torch.float64)) + factor * g.double()
    return total


def norm(gradients: Mapping[str, Tensor]) -> float:
    """Euclidean norm over all parameters.

    Args:
        gradients: by name.

    Returns:
        The norm.
    """
    return math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))


def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Euclidean distance; a parameter that is missing counts as zero."""
    zero = torch.zeros((), dtype=torch.float64)
    return norm({n: a.get(n, zero).double() - b.get(n, zero).double() for n in a.keys() | b.keys()})


def drawn_after(loader: DataLoader[Any], seed: int) -> Sequence[Sequence[int]]:
    """The batches that a private loader draws after a seed; it is left at the seed.

    Args:
        loader: of dpfix, which draws from a stream of its own, or of Opacus, with a generator.
        seed: the seed.

    Returns:
        Indices of the samples, batch by batch.
    """
    sampler, generator = loader.batch_sampler, loader.generator
    if isinstance(sampler, PoissonSampler):
        sampler.source = Stream((seed,))  # a pass over the sampler itself would be recorded as draws of the training
        numbers = Stream((seed,))
        if sampler.ledger.position.reproducible:
            numbers = Stream((new_seed(numbers.generator()),))
        chosen = (numbers.uniform(sampler.num_samples) < sampler.sample_rate for _ in range(sampler.steps))
        return [sampler.indices[rows].tolist() for rows in chosen]
    generator.manual_seed(seed)
    torch.empty((), dtype=torch.int64).random_(generator=generator)  # a DataLoader draws a seed for its workers
    drawn = list(sampler)
    generator.manual_seed(seed)
    return drawn

"""Per-sample gradients with ``vmap``, for scripts that compute them themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from dpfix.engines.functional.call import without_fallback_warnings
from dpfix.engines.functional.parameter_swap import Aliases, attributes_kept, parameter_slots, swapped
from dpfix.engines.functional.workarounds import Workarounds
from dpfix.engines.opacus.hooks import hooks_of, refuse_transforms
from dpfix.engines.saved_bytes import saved_bytes
from dpfix.errors import ArgumentError, ModelError
from dpfix.instrument import pytree
from dpfix.instrument.module_state import put_back, state_of, traceless

MEMORY = 2**30
"""Bytes that the activations of one chunk of samples may take."""


def per_sample_gradients(
    model: nn.Module,
    training_step: Callable[[nn.Module, Any], torch.Tensor],
    batch: Any,
    *,
    rows: int = 1,
    memory: int = MEMORY,
    vectorized: bool = True,
) -> dict[str, torch.Tensor]:
    """The gradient of every sample's loss: the whole model under ``vmap``, and one ordinary backward pass.

    For loops under ``grad_sample_mode="no_op"`` that put per-sample gradients on ``p.grad_sample`` themselves (Opacus
    issue #626). The model is called as it is, with its parameters exchanged for the time of the call, so that keyword
    arguments, nested outputs and methods other than ``forward`` work; buffers are read only; dropout draws anew for every
    sample.

    Args:
        model: the model, plain or as ``make_private_safe`` returned it.
        training_step: ``(model, batch) -> loss`` of a batch with one sample; with several rows (views) per sample, a mean
            over them averages their gradients.
        batch: what the loader delivers; every tensor whose first dimension is as long as that of the first tensor is
            split into samples, all others are given to each sample as they are.
        rows: rows per sample, next to each other (augmentation multiplicity).
        memory: bytes that activations may take at a time; samples are taken in chunks that stay below it.
        vectorized: one sample after the other if ``False``, for models that ``vmap`` cannot follow.

    Returns:
        Gradients of shape ``[samples, *parameter]`` by the names of ``model.named_parameters()``, for those that require
        gradient; zeros where no gradient arrives.

    Raises:
        ArgumentError: the batch holds no tensor, or its rows are not ``rows`` for each sample.
        ModelError: ``vmap`` cannot follow the step.
        MisuseError: the model is in private training with Opacus's hooks, which compute per-sample gradients already.
    """
    hooks = hooks_of(model)
    if hooks is not None:
        refuse_transforms(hooks.model, hooks.mode)
    found = {path: leaf for path, leaf in pytree.leaves(batch) if isinstance(leaf, torch.Tensor) and leaf.dim()}
    size = len(next(iter(found.values()))) if found else 0
    if rows < 1 or not size or size % rows:
        raise ArgumentError(
            f"per_sample_gradients: the batch has {size} rows, which are not rows={rows} per sample.", path="batch"
        )
    split = {p: t.as_subclass(torch.Tensor).unflatten(0, (-1, rows)) for p, t in found.items() if len(t) == size}
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    slots = parameter_slots(model, parameters)

    def loss_of_one(own: Aliases, tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
        given = dict(zip(split, tensors, strict=True))

        def replaced(path: pytree.Path, leaf: Any) -> Any:
            return given.get(path, leaf)

        with swapped(slots, own):
            return training_step(model, pytree.map_leaves(replaced, batch))

    samples = list(zip(*split.values(), strict=True))
    before = state_of(model)
    try:
        if not vectorized:
            return _stacked([_of_one(loss_of_one, parameters, tensors) for tensors in samples])
        with traceless(model, before):
            one = _bytes_of_one(loss_of_one, parameters, samples[0])
        chunks = list(zip(*(t.split(max(1, memory // max(1, one))) for t in split.values()), strict=True))
        return _mapped(model, loss_of_one, parameters, chunks)
    finally:
        put_back(model, before)


Loss = Callable[[Aliases, tuple[torch.Tensor, ...]], torch.Tensor]


def _mapped(
    model: nn.Module, loss: Loss, parameters: Mapping[str, nn.Parameter], chunks: list[tuple[torch.Tensor, ...]]
) -> Aliases:
    try:
        with without_fallback_warnings(), attributes_kept(model):
            return _joined([_of_chunk(loss, parameters, tensors) for tensors in chunks])
    except (RuntimeError, ValueError) as error:
        raise ModelError(
            f"per_sample_gradients: torch.func cannot follow the training step of {type(model).__name__}: {error}\n"
            "  why:  vmap runs all samples at once; a branch on a value, .item(), or a write into a buffer needs one of them.\n"
            "  help: pass vectorized=False, or let make_private_safe choose an engine (grad_sample_mode='auto')."
        ) from error


def _of_chunk(loss: Loss, parameters: Mapping[str, nn.Parameter], tensors: tuple[torch.Tensor, ...]) -> Aliases:
    """Forward under ``vmap`` with parameters that have a leading sample dimension, one ordinary backward pass for all."""
    samples = len(tensors[0])

    def worked_around(own: Aliases, of_one: tuple[torch.Tensor, ...]) -> torch.Tensor:
        with Workarounds():
            return loss(own, of_one)

    leaves = {n: p.detach().expand(samples, *p.shape).requires_grad_() for n, p in parameters.items()}
    with torch.enable_grad():
        return _gradients(torch.vmap(worked_around, randomness="different")(leaves, tensors).sum(), leaves)


def _of_one(loss: Loss, parameters: Mapping[str, nn.Parameter], tensors: tuple[torch.Tensor, ...]) -> Aliases:
    leaves = {n: p.detach().requires_grad_() for n, p in parameters.items()}
    with torch.enable_grad():
        return _gradients(loss(leaves, tensors), leaves)


def _gradients(loss: torch.Tensor, leaves: Aliases) -> Aliases:
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(leaves.items(), found, strict=True)}


def _stacked(samples: list[Aliases]) -> Aliases:
    return {n: torch.stack([s[n] for s in samples]) for n in samples[0]}


def _joined(chunks: list[Aliases]) -> Aliases:
    return chunks[0] if len(chunks) == 1 else {n: torch.cat([c[n] for c in chunks]) for n in chunks[0]}


def _bytes_of_one(loss: Loss, parameters: Mapping[str, nn.Parameter], tensors: tuple[torch.Tensor, ...]) -> int:
    """What autograd keeps for one sample, parameters apart."""
    leaves = {n: p.detach().requires_grad_() for n, p in parameters.items()}
    with torch.enable_grad(), saved_bytes(leaves.values()) as saved:
        loss(leaves, tensors)
    return sum(saved.values())

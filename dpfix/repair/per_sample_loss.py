"""The general cure of a loss that couples the samples of a batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dpfix.errors import USER_CODE_ERRORS, LossError
from dpfix.instrument import pytree
from dpfix.instrument.function_modes import as_one


class PerSampleLoss(nn.Module):
    """Any criterion, applied to every sample alone and averaged.

    The loss of a batch becomes ``(1/n) sum_i criterion(output_i, target_i)``, each sample as a batch of one. For a
    criterion that is already a mean over samples this is the same number; for one that couples them (class weights with
    a mean, ``ignore_index``, Dice over the batch) it is the loss whose share of sample i depends on sample i alone.

    A sample in which nothing counts (every target is ``ignore_index``, or has class weight 0; or the criterion divides by
    the number of what counts and raises ``ZeroDivisionError``) contributes 0, not 0/0.

    Criteria that ``torch.func.vmap`` can follow are computed for all samples at once. That is tried on the first batch of
    every form, and kept if values and gradients equal those of a loop over the samples; all others stay in the loop.

    Args:
        criterion: any loss: ``criterion(output, target, ...) -> scalar``. Outputs and targets may be nested (deep
            supervision); every tensor in them has the samples in dimension 0.

    >>> loss = PerSampleLoss(nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0])))
    >>> round(float(loss(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]))), 4)
    0.2201
    """

    def __init__(self, criterion: Callable[..., Any]) -> None:
        super().__init__()
        self.criterion = criterion
        self._follows: dict[Any, bool] = {}

    def forward(self, *arguments: Any, **keywords: Any) -> torch.Tensor:
        """The mean of the samples' losses.

        Args:
            *arguments: the criterion's arguments; tensors have shape ``[samples, ...]``.
            **keywords: the criterion's keyword arguments; tensors likewise.

        Returns:
            A scalar.

        Raises:
            LossError: the tensors hold different numbers of samples, or none.
        """
        return as_one(self._mean, (arguments, keywords))

    def _mean(self, tree: Any) -> torch.Tensor:
        samples = _samples(tree)
        nothing_counts = _nothing_counts(self.criterion, *tree)
        if samples > 1 and nothing_counts is None and self._can_be_vectorised(tree, samples):
            return self._vectorised(tree)
        void = [False] * samples if nothing_counts is None else nothing_counts.tolist()
        return self._loop(tree, void)

    def _loop(self, tree: Any, void: list[bool]) -> torch.Tensor:
        return torch.stack([self._one(tree, i, nothing) for i, nothing in enumerate(void)]).mean()

    def _one(self, tree: Any, i: int, nothing_counts: bool) -> torch.Tensor:
        def take(_: pytree.Path, leaf: Any) -> Any:
            return leaf[i : i + 1] if _has_samples(leaf) else leaf

        args, kwargs = pytree.map_leaves(take, tree)
        if nothing_counts:
            return _nothing(args, kwargs)
        try:
            return self.criterion(*args, **kwargs)
        except ZeroDivisionError:  # a mean over what counts, by a Python number
            return _nothing(args, kwargs)

    def _vectorised(self, tree: Any) -> torch.Tensor:
        tree = pytree.plain(tree)

        def one(*rows: torch.Tensor) -> torch.Tensor:
            rest = iter(rows)
            args, kwargs = pytree.map_leaves(
                lambda _, leaf: next(rest).unsqueeze(0) if _has_samples(leaf) else leaf, tree
            )
            return self.criterion(*args, **kwargs)

        return torch.func.vmap(one)(*(leaf for leaf in pytree.tensors(tree) if leaf.dim())).mean()

    def _can_be_vectorised(self, tree: Any, samples: int) -> bool:
        """Whether vmap follows the criterion for arguments of this form; the first time it is compared with the loop."""
        form = tuple((path, leaf.dtype, leaf.dim()) for path, leaf in pytree.leaves(tree) if torch.is_tensor(leaf))
        if form not in self._follows:
            with torch.random.fork_rng(devices=[]), torch.enable_grad():
                self._follows[form] = _agree(self._vectorised, lambda t: self._loop(t, [False] * samples), tree)
        return self._follows[form]


def _agree(fast: Callable[[Any], torch.Tensor], slow: Callable[[Any], torch.Tensor], tree: Any) -> bool:
    """Whether two ways to a loss lead to the same value and the same gradients."""

    def fresh(_: pytree.Path, leaf: Any) -> Any:
        if not torch.is_tensor(leaf):
            return leaf
        copied = leaf.detach().clone()
        return copied.requires_grad_() if leaf.is_floating_point() else copied

    mine, other = pytree.map_leaves(fresh, tree), pytree.map_leaves(fresh, tree)
    try:
        wanted = _value_and_gradients(slow, other)
        found = _value_and_gradients(fast, mine)
    except (*USER_CODE_ERRORS, UserWarning):
        return False  # vmap does not follow it, or the criterion fails: then the loop says how
    tolerance = 1e-6 if wanted[0].dtype == torch.float64 else 1e-4
    return all(
        a.shape == b.shape and torch.allclose(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))
        for a, b in zip(found, wanted, strict=True)
    )


def _value_and_gradients(way: Callable[[Any], torch.Tensor], tree: Any) -> list[torch.Tensor]:
    loss = way(tree)
    inputs = pytree.gradient_tensors(tree)
    gradients = torch.autograd.grad(loss, inputs, allow_unused=True) if loss.requires_grad else ()
    return [loss.detach(), *(torch.zeros_like(t) if g is None else g for t, g in zip(inputs, gradients, strict=False))]


def _has_samples(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.dim() > 0


def _samples(tree: Any) -> int:
    sizes = {t.shape[0] for t in pytree.tensors(tree) if t.dim()}
    if len(sizes) != 1 or 0 in sizes:
        raise LossError(
            f"PerSampleLoss got tensors with {sorted(sizes)} rows in dimension 0;",
            "every output and target has to hold the same samples, at least one.",
            "Pass per-sample outputs and targets, [samples, ...] each.",
            path="criterion",
        )
    return sizes.pop()


def _nothing(args: Any, kwargs: Any) -> torch.Tensor:
    outputs = pytree.gradient_tensors((args, kwargs)) or pytree.tensors((args, kwargs))
    return sum((t.sum() * 0 for t in outputs[1:]), outputs[0].sum() * 0)


def _nothing_counts(criterion: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """In which samples no target counts; ``None`` if there is none (or if the criterion ignores nothing)."""
    target = args[1] if len(args) > 1 else kwargs.get("target")
    ignore = _setting(criterion, kwargs, "ignore_index")
    if ignore is None or not isinstance(target, torch.Tensor) or target.is_floating_point() or not target.dim():
        return None
    counts = target != ignore
    weight = _setting(criterion, kwargs, "weight")
    if isinstance(weight, torch.Tensor):
        counts &= weight[target.where(counts, 0)] != 0
    void = ~counts.flatten(1).any(1) if counts.dim() > 1 else ~counts
    return void if bool(void.any()) else None


def _setting(criterion: Any, kwargs: dict[str, Any], name: str) -> Any:
    """A setting of a criterion: given with the call, kept by the object, or the default of the function."""
    if name in kwargs or hasattr(criterion, name):
        return kwargs.get(name, getattr(criterion, name, None))
    if isinstance(criterion, nn.Module) or not callable(criterion):
        return None
    try:
        parameter = inspect.signature(criterion).parameters.get(name)
    except (TypeError, ValueError):
        return None
    return None if parameter is None or parameter.default is inspect.Parameter.empty else parameter.default

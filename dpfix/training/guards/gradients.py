"""Gradients come from the engine, are released as they came, and are finite."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from opacus.optimizers import DPOptimizer
from typing_extensions import override

from dpfix.engines import engine_of
from dpfix.errors import NonFiniteGradientError, PlanBrokenError
from dpfix.instrument.grad_watch import GradWatch
from dpfix.instrument.sharded import local
from dpfix.instrument.source import warn_user
from dpfix.training.guards.check import Check, Guarded


class ThroughTheEngine(Check):
    """No gradient reaches a trained parameter past the engine, where the engine keeps them all to itself.

    Catches: penalties on weights in the loss, and parts of the model called directly, whose gradient cannot be clipped per
    sample. Costs: a look at a list.

    Args:
        guarded: the training.
        watch: knows what autograd accumulated; :class:`UneditedGradients` looks after it.
    """

    def __init__(self, guarded: Guarded, watch: GradWatch) -> None:
        self._name = guarded.name
        self._watch = watch
        self._owned = engine_of(guarded.plan).owns_gradients
        self._past = [] if guarded.shards is None else guarded.shards.past

    @override
    def before_step(self, optimizer: DPOptimizer) -> None:
        arrived = self._watch.arrived or self._past
        if self._owned and arrived:
            name = arrived[0]
            raise PlanBrokenError(
                f"gradient reached parameter `{name}` of {self._name} past the model's forward: by a penalty on weights in "
                "the loss, or a part of the model called directly.",
                "It cannot be clipped per sample.",
                "Use weight_decay for penalties, and call the model as a whole.",
                path=name,
            )


class UneditedGradients(Check):
    """``p.grad`` is what autograd made of it; warns once otherwise.

    Catches: ``clip_grad_norm_`` and edits by hand, which the release ignores. Costs: a look at every ``p.grad``, twice.

    Args:
        watch: knows what autograd accumulated.
    """

    def __init__(self, watch: GradWatch) -> None:
        self._watch = watch
        self._told = False

    @override
    def cleared(self) -> None:
        self._watch.reset()

    @override
    def before_step(self, optimizer: DPOptimizer) -> None:
        if not self._told and (edited := self._watch.edited()):
            self._told = True
            warn_user(
                f"p.grad of `{edited[0]}` was changed between backward() and step() ({len(edited)} parameter(s)), for "
                "example by clip_grad_norm_. The private optimizer releases the clipped sum of per-sample gradients "
                "and ignores p.grad; change max_grad_norm, or edit p.grad in a hook after the noise."
            )

    @override
    def detach(self) -> None:
        self._watch.remove()


class FiniteSum(Check):
    """What is released is finite: a sample whose gradient is not contributes nothing, and a sum that is not is refused.

    Catches: one record that stops a training or steers it, parameters that become NaN for good, and noise drawn in vain.
    Costs: a look at the samples' norms where the engine has clipped, otherwise one pass over the clipped sum.

    The warning is given once and says neither which samples nor how many: both depend on the data and carry no noise. A
    draw of several samples none of which is left is refused: there the model or the loss is at fault, not a record.
    """

    def __init__(self, guarded: Guarded) -> None:
        self._guarded = guarded
        self._told = False
        self._samples = self._left_out = 0

    @override
    def collected(self, optimizer: DPOptimizer, counts: list[int], drawn: int | None) -> None:
        if not self._guarded.progress.partial:
            self._samples = self._left_out = 0
        self._samples += 0 if drawn == 0 else sum(counts)

    def clip(self, optimizer: DPOptimizer, by_opacus: Callable[[], None]) -> torch.Tensor | None:
        """Let Opacus clip; once more without samples whose gradient is not finite, which it would multiply with a factor.

        Args:
            optimizer: the private optimizer, whose parameters have ``grad_sample``.
            by_opacus: its own clipping.

        Returns:
            Shape ``[samples, 1]``, not finite for those that were left out; ``None`` if none was.
        """
        parameters: list[Any] = optimizer.params
        earlier = [p.summed_grad for p in parameters]
        counted = {name: copy.deepcopy(value) for name, value in vars(optimizer).items() if name in _COUNTED}
        _forget_sum(parameters)
        by_opacus()
        left_out = None if self._is_finite() else _not_finite(parameters)
        if left_out is not None and not bool(left_out.any()):
            self._check_sum()
            left_out = None
        if left_out is not None:
            _forget_sum(parameters)
            vars(optimizer).update(counted)
            _drop_samples(parameters, left_out)
            if bool(left_out.all()):
                for p in parameters:
                    p.summed_grad = torch.zeros_like(p, requires_grad=False)
            else:
                by_opacus()
        for p, before in zip(parameters, earlier, strict=True):
            if before is not None:
                p.summed_grad = before.add_(p.summed_grad)
        return None if left_out is None else torch.zeros(len(left_out), 1).masked_fill_(left_out[:, None], math.nan)

    @override
    def take_over(self, earlier: FiniteSum) -> None:
        self._told, self._samples, self._left_out = earlier._told, earlier._samples, earlier._left_out

    @override
    def summed(self, norms: torch.Tensor | None) -> None:
        if norms is None:  # Opacus has clipped, and the sum was read then; or nothing was drawn
            return
        values = norms.sum(1).tolist()
        if math.isfinite(sum(values)):
            return  # a sum of finitely many finite gradients: no need to read it again
        left_out = sum(not math.isfinite(value) for value in values)
        self._left_out += left_out
        parameters = self._guarded.parameters.items()
        if left_out and (bad := [name for name, p in parameters if not bool(torch.isfinite(local(p)).all())]):
            self._refuse(
                f"parameter `{bad[0]}` of {self._guarded.name} is not finite ({len(bad)} parameter(s))", bad[0]
            )
        if not self._is_finite():
            self._check_sum()

    @override
    def before_noise(self, optimizer: DPOptimizer) -> None:
        if not self._left_out:
            return
        if self._left_out == self._samples > 1:
            self._refuse(f"the gradient of every sample in the batch is not finite in {self._guarded.name}", "module")
        if not self._told:
            self._told = True
            warn_user(
                f"the gradient of a sample is not finite in {self._guarded.name} (NaN or infinity in the data, or in what the "
                "model or the loss makes of it). Such a sample contributes nothing to this step or to later ones, and the "
                "training goes on. This is said once; which samples and how many stays untold, since that has no noise. "
                "Look for values that are not finite in the dataset (torch.isfinite)."
            )

    def _check_sum(self) -> None:
        parameters = self._guarded.parameters.items()
        bad = [name for name, p in parameters if not bool(torch.isfinite(p.summed_grad).all())]  # type: ignore[attr-defined]
        if bad:  # else finite sums whose own sum is too large for a quick look
            what = f"the clipped sum of parameter `{bad[0]}` of {self._guarded.name} is not finite"
            self._refuse(f"{what} ({len(bad)} parameter(s))", bad[0])

    def _is_finite(self) -> bool:
        parameters = self._guarded.parameters.values()
        totals = [p.summed_grad.sum() for p in parameters if p.summed_grad is not None]  # type: ignore[attr-defined]
        return not totals or math.isfinite(torch.stack([t.to(totals[0].device) for t in totals]).sum())

    def _refuse(self, fact: str, path: str) -> NoReturn:
        self._guarded.forget_sum()
        self._guarded.progress.partial = 0
        self._guarded.handle.finish()
        raise NonFiniteGradientError(
            f"{fact}.",
            "No parameter was moved and no noise was drawn.",
            "Lower the learning rate, look for divisions by zero and logarithms in the loss, or use float32 instead of "
            "autocast.",
            path=path,
        )


_COUNTED = ("sample_size", "unclipped_num")
"""What adaptive clipping counts while it clips."""


def _forget_sum(parameters: list[Any]) -> None:
    for p in parameters:
        p.summed_grad = None


def _iterations(p: Any) -> list[torch.Tensor]:
    return p.grad_sample if isinstance(p.grad_sample, list) else [p.grad_sample]


def _not_finite(parameters: list[Any]) -> torch.Tensor:
    """Which samples have a gradient that is not finite, shape ``[samples]``, on the CPU."""
    every = [torch.cat([torch.isfinite(g.flatten(1)).all(1) for g in _iterations(p)]).cpu() for p in parameters]
    return ~torch.stack(every).all(0)


def _drop_samples(parameters: list[Any], left_out: torch.Tensor) -> None:
    """Take the rows of some samples out of the per-sample gradients."""
    for p in parameters:
        parts = _iterations(p)
        masks = left_out.to(p.device).split([len(g) for g in parts])
        kept = [g[~mask] for g, mask in zip(parts, masks, strict=True)]
        p.grad_sample = kept if isinstance(p.grad_sample, list) else kept[0]

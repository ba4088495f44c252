"""An optimizer class of the script's own that clips by itself: what a sample moves its sum by is measured on real steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dpfix.errors import ArgumentError, PlanBrokenError
from dpfix.instrument.clipping import Scheme
from dpfix.training.follow.agenda import Agenda

LEFT_OUT = 4
"""Samples that are left out, one at a time, in a step that is looked at."""
SLACK = 1e-3
"""How much more than C a sample may move the sum, relatively; and ``ROUNDING`` for every sample."""
ROUNDING = 1e-6


def refuse_scheme(optimizer: Any, scheme: Scheme, by_scheme: bool) -> None:
    """Ways to clip that dpfix adds are not those of a class of the script's own.

    Args:
        optimizer: a private optimizer.
        scheme: how the call asks to clip.
        by_scheme: whether the optimizer does so.

    Raises:
        ArgumentError: the class clips in its own way.
    """
    if scheme.plain or by_scheme:
        return
    raise ArgumentError(
        f"clipping={scheme.name!r} with {type(optimizer).__name__}, an optimizer class of your own that clips by itself.",
        "It would clip in its way, and the statement would name another.",
        "Take clip_and_accumulate out of the class, or leave clipping= out.",
        path="clipping",
    )


class OwnClipping:
    """Leaves single samples out of the sum, on the first steps and on random later ones.

    Catches: a class whose sum a sample moves by more than the clip norm. Costs: as many sums as samples that are left out, in
    such a step.
    """

    def __init__(self) -> None:
        self._agenda = Agenda()

    def clip(self, optimizer: Any, by_class: Callable[[], None]) -> None:
        """Let the class clip.

        Args:
            optimizer: the private optimizer, whose parameters have ``grad_sample`` and no sum.
            by_class: the class's own ``clip_and_accumulate``.

        Raises:
            PlanBrokenError: a sample moves the sum by more than the clip norm.
        """
        given = [optimizer._get_flat_grad_sample(p) for p in optimizer.params]
        clip_norm, samples = float(optimizer.max_grad_norm), len(given[0]) if given else 0
        state = dict(vars(optimizer))
        by_class()
        if samples and self._agenda.due(set()):
            with self._agenda.check():
                moved = self._largest_move(optimizer, by_class, given, state)
            if not moved <= clip_norm * (1 + SLACK + ROUNDING * samples):
                raise PlanBrokenError(
                    f"{type(optimizer).__name__}.clip_and_accumulate: leaving one sample out moves the sum by "
                    f"{moved / clip_norm:.3g} clip norms.",
                    "The noise is made for one. Nothing was released.",
                    "Let the class give every sample at most max_grad_norm, whatever the others are, or use Opacus's own.",
                    path="optimizer",
                )

    def _largest_move(
        self, optimizer: Any, by_class: Callable[[], None], given: list[torch.Tensor], state: dict[str, Any]
    ) -> float:
        parameters, samples = optimizer.params, len(given[0])
        whole, had = [p.summed_grad for p in parameters], [p.grad_sample for p in parameters]
        after, largest = dict(vars(optimizer)), 0.0
        try:
            for left_out in self._agenda.draw.sample(range(samples), min(LEFT_OUT, samples)):
                vars(optimizer).update(state)
                others = [i for i in range(samples) if i != left_out]
                for p, rows in zip(parameters, given, strict=True):
                    p.summed_grad, p.grad_sample = None, rows[others]
                if others:
                    by_class()
                gaps = [
                    float((total.double() - (0.0 if p.summed_grad is None else p.summed_grad.double())).norm())
                    for p, total in zip(parameters, whole, strict=True)
                ]
                largest = max(largest, float(torch.tensor(gaps).double().norm()))
        finally:
            vars(optimizer).update(after)
            for p, total, rows in zip(parameters, whole, had, strict=True):
                p.summed_grad, p.grad_sample = total, rows
        return largest

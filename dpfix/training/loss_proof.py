"""The proof that the loop's loss couples no samples, made on the first real steps where it could not be made before.

Without ``criterion`` or ``training_step`` nobody has told dpfix the loss. What the script does between the model's output
and ``loss.backward()`` is then followed function by function, and repeated with the other samples exchanged: the
gradient with respect to sample i's output must not change. This happens inside ``backward()``, before any gradient is
taken and before a parameter moves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from dpfix.errors import USER_CODE_ERRORS, CoupledLossError, LossError
from dpfix.instrument import pytree
from dpfix.instrument.source import calling_line, warn_user
from dpfix.layout.calls import find_layout, samples_in
from dpfix.layout.rows import Rows
from dpfix.layout.sample_dim import SampleDim
from dpfix.observe.loss_trace import LossTrace, is_on, switch_off, switch_on
from dpfix.plan import Plan
from dpfix.report.finding import Finding

STEPS = 3
"""Real steps with at least two samples on which the loss is followed."""

POSTPONED = 30
"""Steps for which the proof is put off since the gradient of a sample is not finite."""

SAMPLES = 4
"""Samples of such a step whose gradient is compared."""

_TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-3}
_HALF = 5e-2
_TELLS_NOTHING = frozenset({"__get__", "data_ptr", "__repr__", "__format__", "__hash__"})


class _NotFollowedError(Exception):
    """The way from the output to the loss cannot be repeated; caught inside this file."""


class _NotFiniteError(Exception):
    """A sample in the batch has a gradient that is not finite, and cannot be compared; caught inside this file."""


class LossProof:
    """Follows the loop's loss on the first real steps.

    Args:
        plan: how it is being trained.
        paused: the engine's hooks do nothing while it is entered.
    """

    def __init__(
        self, module: nn.Module, plan: Plan, paused: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> None:
        self._module = module
        self._paused = paused
        self._mean = plan.loss_reduction == "mean"
        self._layouts = plan.calls
        self._trace = LossTrace(self._check)
        self._left, self._postponed = STEPS, 0
        self._seen = False  # a loss of the present step was followed
        self._hooks = [
            module.register_forward_pre_hook(self._enter, prepend=True),
            module.register_forward_hook(self._leave, with_kwargs=True, always_call=True),
        ]

    def remove(self) -> None:
        """Take everything off; the proof is made or the training over."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.clear()

    def clear(self) -> None:
        """A new step begins."""
        switch_off(self._trace)
        self._trace.clear()
        self._seen = False

    @property
    def done(self) -> bool:
        """Whether there is nothing left to do."""
        return not self._hooks and not is_on(self._trace)

    def before_step(self) -> None:
        """The optimizer is about to step: say so if its loss went past."""
        if self._hooks and not self._seen and max(self._trace.samples, default=0) > 1:
            self._give_up(
                self._trace.broken or "backward() was not called on a tensor, but on several or by autograd.grad"
            )
        elif self._left <= 0:
            self.remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._trace.paused = True

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not torch.is_grad_enabled() or not pytree.gradient_tensors(output):
            return
        layout = find_layout(self._layouts, args, kwargs)
        if layout is None:
            self._trace.gap("a call of the model has a form that the probe did not show")
            return
        self._trace.start(output, layout, samples_in(layout, module, args, kwargs))
        switch_on(self._trace)
        self._trace.paused = False

    def _check(self, loss: torch.Tensor, backward: Any) -> None:
        """Called by ``loss.backward()``.

        Raises:
            CoupledLossError: sample i's gradient depends on the others.
            LossError: the loss is a sum, and a mean was announced, or the other way round.
        """
        trace = self._trace
        if max(trace.samples, default=0) < 2:
            return  # a sample alone, or the stand-in of an empty draw
        place = calling_line()
        try:
            with self._paused():
                replay = _Replay(trace, loss, backward)
            self._seen = True
            coupled = replay.coupled_sample()
            other = "" if coupled is not None else replay.other_reduction(self._mean)
        except _NotFollowedError as why:
            self._give_up(str(why))
            return
        except _NotFiniteError:
            self._seen, self._postponed = True, self._postponed + 1
            if self._postponed > POSTPONED:
                self._give_up("its gradient was not finite in each of the first steps")
            return
        finally:
            trace.entries.clear()  # they hold the loss's graph
        if coupled is None and not other:
            self._left -= 1
            return
        self.clear()
        if coupled is None:
            raise LossError(_other_reduction(other, place))
        raise CoupledLossError(_coupled(coupled, place))

    def _give_up(self, why: str) -> None:
        self.remove()
        warn_user(
            f"the loop's loss could not be followed to the outputs of {type(self._module).__name__}: {why}. Whether it couples "
            "the samples of a batch (batch Dice, class weights with mean, ignore_index) is not checked, and the guarantee "
            "rests on it. Pass criterion= or training_step= to make_private_safe."
        )


def _coupled(gap: float, place: str) -> Finding:
    return Finding.refusal(
        "DPF014",
        f"the loss on which backward() is called ({place or 'place unknown'}) couples the samples of a batch: exchanging the "
        f"other samples changes the gradient of one sample's output by {gap:.1e} (relative).",
        "one sample's share of the loss depends on the others, so clipping per sample bounds nothing. Known causes: a "
        "mean over the valid elements of the batch (ignore_index), class weights with reduction='mean', batch=True in a Dice "
        "loss, a contrastive or rank loss.",
        "criterion = dpfix.PerSampleLoss(criterion)  # applies any criterion to every sample alone, then averages. "
        "No parameter has moved in this step.",
        path="criterion",
    )


def _other_reduction(other: str, place: str) -> Finding:
    announced = "sum" if other == "mean" else "mean"
    return Finding.refusal(
        "DPF015",
        f"the loss on which backward() is called ({place or 'place unknown'}) is a {other} over the samples, but "
        f"loss_reduction='{announced}' was announced.",
        "per-sample gradients would be scaled by the batch size before clipping.",
        f"pass loss_reduction='{other}' to make_private_safe, or use reduction='{announced}' in the criterion.",
        path="loss_reduction",
    )


# ------------------------------------------------------------------ repeating the way to the loss

Change = Callable[[torch.Tensor, Rows], torch.Tensor]


class _Replay:
    """The way from the outputs to the loss, repeated with other values."""

    def __init__(self, trace: LossTrace, loss: torch.Tensor, backward: Any) -> None:
        if trace.broken:
            raise _NotFollowedError(trace.broken)
        if len(trace.samples) != 1:
            raise _NotFollowedError("calls of the model in one step hold different numbers of samples")
        if id(loss) not in trace.known:
            raise _NotFollowedError("the loss is not made by torch functions from the model's outputs")
        self.trace, self.loss, self.backward = trace, loss, backward
        if any(output.dim.counts for output in trace.outputs.values()):
            raise _NotFollowedError("samples have different numbers of rows")
        self.samples = next(iter(trace.samples))
        first = next(iter(trace.outputs.values())).dim
        self.rows = {key: _rows_of(value, self.samples, first) for key, value in trace.constants.items()}
        self.rows |= dict.fromkeys(trace.settings)
        self.plain = self._gradients(lambda t, rows: t)
        if not all(bool(torch.isfinite(g).all()) for g in self.plain):
            raise _NotFiniteError
        self._check_repeats()

    def _check_repeats(self) -> None:
        """The repetition must be the very loss: a custom autograd.Function shows its forward only."""
        pairs = [
            (output.tensor, plain)
            for output, plain in zip(self.trace.outputs.values(), self.plain, strict=True)
            if output.tensor._version == output.version  # else it was overwritten and is another tensor now
        ]
        if not pairs:
            return
        args, kwargs = self.backward
        outer = kwargs.get("gradient", args[0] if args else None)
        found = torch.autograd.grad(self.loss, [t for t, _ in pairs], outer, retain_graph=True, allow_unused=True)
        for (_, plain), real in zip(pairs, found, strict=True):
            gap = torch.linalg.vector_norm(plain - (0 if real is None else real))
            if not float(gap) <= _TOLERANCE.get(plain.dtype, _HALF) * float(torch.linalg.vector_norm(plain)):
                raise _NotFollowedError(
                    "its gradient is not the one of the functions it calls (a custom autograd.Function)"
                )

    def coupled_sample(self) -> float | None:
        """The change of a sample's gradient when the others are exchanged, if it is more than rounding."""
        n = self.samples
        for sample in sorted({round(k * (n - 1) / (SAMPLES - 1)) for k in range(SAMPLES)}):
            for number, change in enumerate(self._exchanges(sample)):
                try:
                    gap = self._gap(sample, self._gradients(change))
                except _NotFollowedError:
                    if number == 0:
                        raise
                    continue  # the loop decides by its targets (a mask without anything in it)
                if gap:
                    return gap
        return None

    def _exchanges(self, sample: int) -> Iterator[Change]:
        n = self.samples
        # Copies of one sample: their order may not matter to a loss that compares samples.
        copies = [sample if j == sample else (sample + 1) % n for j in range(n)]
        yield lambda t, rows: rows.select(t, copies)
        for extreme in (torch.amin, torch.amax):

            def filled(t: torch.Tensor, rows: Rows, extreme: Any = extreme) -> torch.Tensor:
                if t.is_complex() or not bool((t == t.round() if t.is_floating_point() else t == t).all()):
                    return t  # an output, or a target that is no class
                same = extreme(t).expand_as(t).clone()
                rows.take(same, sample).copy_(rows.take(t, sample))
                return same

            yield filled

    def _gap(self, sample: int, changed: list[torch.Tensor]) -> float:
        worst = 0.0
        for before, after, output in zip(self.plain, changed, self.trace.outputs.values(), strict=True):
            rows = Rows.of(output.dim, self.samples)
            norms = [float(torch.linalg.vector_norm(rows.take(before, i).double())) for i in range(self.samples)]
            scale = max(norms[sample], 1e-2 * max(norms), 1e-30)
            difference = rows.take(before, sample).double() - rows.take(after, sample).double()
            gap = float(torch.linalg.vector_norm(difference)) / scale
            if not gap <= _TOLERANCE.get(before.dtype, _HALF):
                worst = max(worst, gap if math.isfinite(gap) else math.inf)
        return worst

    def other_reduction(self, mean: bool) -> str:
        """``"sum"`` or ``"mean"`` if that is what the loss is and the other was announced; empty if it cannot be told."""
        n, half = self.samples, list(range((self.samples + 1) // 2))
        try:
            changed = self._gradients(lambda t, rows: rows.select(t, half), same_length=False)
        except _NotFollowedError:
            return ""
        ratios = []
        for before, after, output in zip(self.plain, changed, self.trace.outputs.values(), strict=True):
            whole = torch.linalg.vector_norm(Rows.of(output.dim, n).take(before, 0).double())
            part = torch.linalg.vector_norm(Rows.of(output.dim, len(half)).take(after, 0).double())
            if float(whole) > 0:
                ratios.append(float(part / whole))
        if not ratios or self._divides_by_hand(n):
            return ""
        is_mean = all(abs(r - n / len(half)) < 0.05 * r for r in ratios)
        is_sum = all(abs(r - 1) < 0.05 for r in ratios)
        return "sum" if is_sum and mean else "mean" if is_mean and not mean else ""

    def _divides_by_hand(self, n: int) -> bool:
        """Whether the batch size may be written into the loss as a number (``/ len(x)``): it does not change with the rows."""
        leaves = [leaf for e in self.trace.entries for _, leaf in pytree.leaves((e.args, e.kwargs))]
        numbers = [abs(x) for x in leaves if type(x) in {int, float} and x]
        return any(size >= n and abs(size / n - round(size / n)) < 1e-6 for x in numbers for size in (x, 1 / x))

    def _gradients(self, change: Change, *, same_length: bool = True) -> list[torch.Tensor]:
        """Gradients of the loss with respect to the outputs, with outputs and targets changed."""
        values: dict[int, torch.Tensor] = {}
        leaves = []
        for key, value in self.trace.constants.items():
            rows = self.rows[key]
            values[key] = (value if rows is None else change(value, rows)).clone()
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            for key, output in self.trace.outputs.items():
                leaf = change(output.values, Rows.of(output.dim, self.samples)).detach().requires_grad_()
                leaves.append(leaf)
                values[key] = leaf.clone()  # the loop may write into the output itself
            loss = self._run(values, same_length)
            args, kwargs = self.backward
            outer = kwargs.get("gradient", args[0] if args else None)
            total = (loss * outer).sum() if outer is not None else loss.sum()
            if not total.requires_grad:
                raise _NotFollowedError("the loss does not depend on the model's outputs by torch functions")
            found = torch.autograd.grad(total, leaves, allow_unused=True)
        return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]

    def _run(self, values: dict[int, torch.Tensor], same_length: bool) -> torch.Tensor:
        for entry in self.trace.entries:
            try:
                args, kwargs = pytree.map_leaves(
                    lambda _, leaf: values[id(leaf)] if isinstance(leaf, torch.Tensor) else leaf,
                    (entry.args, entry.kwargs),
                )
                result = entry.function(*args, **kwargs)
            except KeyError as error:
                raise _NotFollowedError("the number of its parts depends on the number of samples") from error
            except USER_CODE_ERRORS as error:
                raise _NotFollowedError(f"{entry.function} does not repeat: {error}") from error
            for (_, old), (_, new) in zip(pytree.leaves(entry.result), pytree.leaves(result), strict=False):
                if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor):
                    values[id(old)] = new
                elif same_length and _tells(entry.function, old) and old != new:
                    raise _NotFollowedError(f"it turns values into Python numbers ({entry.function.__name__})")
        return values[id(self.loss)]


def _tells(function: Callable[..., Any], result: Any) -> bool:
    return isinstance(result, (bool, int, float)) and getattr(function, "__name__", "") not in _TELLS_NOTHING


def _rows_of(value: torch.Tensor, samples: int, output: SampleDim) -> Rows | None:
    """How a tensor that the loss takes beside the output (targets, masks) carries the samples."""
    shape = value.shape
    if len(shape) and shape[0] == samples:
        return Rows(samples)
    if len(shape) > output.dim and shape[output.dim] == samples * output.rows:
        return Rows.of(output, samples)
    if len(shape) > output.dim and shape[output.dim] == samples:
        return Rows(samples, output.dim)
    return None

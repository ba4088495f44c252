"""The engine at work on one model: which layers are recorded, what has arrived, norms and clipped sums."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dpfix.engines.base import Handle, no_counts, per_sample, zeros
from dpfix.engines.bookkeeping.contributions import Contribution
from dpfix.engines.bookkeeping.forward import ReplacedForward
from dpfix.engines.bookkeeping.iteration import Iteration, RootCall
from dpfix.engines.bookkeeping.tied_parameters import add_up
from dpfix.errors import PlanBrokenError
from dpfix.layout.calls import CallLayout, LayerLayout, known_layout, samples_in
from dpfix.plan import Plan

_EPS = 1e-6  # Opacus adds it to every norm; see DPOptimizer.clip_and_accumulate


class BookkeepingHandle(Handle):
    """The engine at work on one model.

    Args:
        module: the repaired model.
        plan: how its calls carry their samples.
    """

    clips = True

    def __init__(self, module: nn.Module, plan: Plan) -> None:
        self.model, self.plan = module, plan
        self.counts: Callable[[], tuple[int, ...]] = no_counts
        self.anchor = torch.zeros((), requires_grad=True)
        self._layers: dict[str, list[LayerLayout]] = {}
        for layer in plan.layers:
            self._layers.setdefault(layer.path, []).append(layer)
        self._iterations: list[Iteration] = []
        self._start()
        self._active: RootCall | None = None
        self._last: RootCall | None = None
        self._replaced: list[ReplacedForward] = []

    def put_in(self, replaced: ReplacedForward) -> None:
        """Replace a module's ``forward``.

        Args:
            replaced: what is put in its place.
        """
        self._replaced.append(replaced)
        vars(replaced.module)["forward"] = replaced

    def detach(self) -> None:
        """Give every module its own ``forward`` back."""
        for replaced in self._replaced:
            vars(replaced.module).pop("forward", None)
        self._replaced.clear()
        self.finish()
        self._last = None

    # -------------------------------------------------------------- calls

    def _start(self) -> Iteration:
        iteration = Iteration()
        iteration.late = self._noticed
        self._iterations.append(iteration)
        return iteration

    def _noticed(self, iteration: Iteration) -> None:
        """A gradient came back to a call of an iteration that was thought to be over."""
        if not any(i is iteration for i in self._iterations):
            self._iterations.insert(0, iteration)

    def call_layout(self, args: Any, kwargs: Any) -> CallLayout:
        """How a call of the model carries its samples.

        Args:
            args: positional arguments.
            kwargs: keyword arguments.

        Returns:
            The layout.
        """
        return known_layout(self.plan.calls, self.model, args, kwargs, self.counts())

    @contextmanager
    def root_call(self, layout: CallLayout, args: Any, kwargs: Any) -> Iterator[RootCall]:
        """The model is being called.

        Args:
            layout: how the call carries its samples.
            args: positional arguments.
            kwargs: keyword arguments.

        Yields:
            The call.
        """
        samples = samples_in(layout, self.model, args, kwargs)
        iteration = self._iterations[-1] if not self._iterations[-1].found else self._start()
        before, self._active = self._active, RootCall(samples, iteration)
        self._last = self._active
        try:
            yield self._active
        finally:
            self._active = before

    def present_call(self) -> RootCall | None:
        """The call of the model that is going on; while checkpointing recomputes, the one that it repeats.

        Returns:
            The call, or ``None`` outside the model.
        """
        if self._active is None and torch._C._current_graph_task_id() != -1:  # type: ignore[attr-defined]
            return self._last
        return self._active

    def count_call(self, path: str) -> int:
        """Count a call of a module in this step.

        Args:
            path: the module's path.

        Returns:
            How many came before.
        """
        if self._active is None:
            return 0
        calls = self._active.iteration.calls
        calls[path] = calls.get(path, 0) + 1
        return calls[path] - 1

    def layout(self, path: str, number: int) -> LayerLayout:
        """How a call of a layer carries its samples.

        Args:
            path: the layer's path.
            number: how many calls of it came before in this step.

        Returns:
            The layout.

        Raises:
            PlanBrokenError: the probe has not shown such a call, or its layout could not be told.
        """
        known = self._layers.get(path, [])
        if not known or (number >= len(known) and any(_form(c) != _form(known[0]) for c in known)):
            raise PlanBrokenError(
                f"layer `{path}` of {type(self.model).__name__} was called {number + 1} time(s) in one step, but "
                f"{len(known)} time(s) in the training step that was checked. Pass the training_step your loop "
                "really makes to make_private_safe."
            )
        found = known[min(number, len(known) - 1)]
        if found.problem:
            raise PlanBrokenError(
                f"it cannot be told which rows of layer `{path}` of {type(self.model).__name__} belong to which sample "
                f"({found.problem})."
            )
        return found.having(self.counts()) if self.plan.row_counter else found

    # -------------------------------------------------------------- gradients

    def clear(self) -> None:
        """Forget the gradients that have arrived; a graph may still lead to the last iteration."""
        for iteration in self._iterations:
            iteration.found.clear()
            iteration.calls.clear()
        del self._iterations[:-1]

    def finish(self) -> None:
        """Forget everything about the step that was made."""
        for iteration in self._iterations:
            iteration.found.clear()
        self._iterations.clear()
        self._start()

    def _arrived(self) -> list[tuple[int, dict[nn.Parameter, list[Contribution]]]]:
        found = []
        for iteration in self._iterations:
            if len(iteration.found) > 1:
                raise PlanBrokenError(
                    f"one backward pass reached calls of {type(self.model).__name__} with different numbers of samples "
                    f"({sorted(iteration.found)}). Their gradients cannot be added per sample; make the calls with the "
                    "same samples, or make one step for each."
                )
            found += iteration.found.items()
        return found

    @torch.no_grad()
    def collect(self, parameters: list[nn.Parameter]) -> list[int]:
        """Leave per-sample gradients on ``grad_sample``, for clippings other than the flat one.

        Args:
            parameters: the trainable parameters.

        Returns:
            Number of samples of every accumulated iteration.
        """
        arrived = self._arrived()
        for p in parameters:
            parts = []
            for samples, found in arrived:
                own = found.get(p)
                scale = self.plan.scale(samples, self.counts())
                if own is None:
                    parts.append(zeros(p, samples))
                    continue
                gradients = add_up(own).per_sample()
                parts.append(gradients * per_sample(scale, gradients))
            p.grad_sample = parts[0] if len(parts) == 1 else parts or None  # type: ignore[attr-defined]
        return [samples for samples, _ in arrived]

    def announce(self, parameters: list[nn.Parameter]) -> list[int]:
        """Leave on ``grad_sample`` what tells Opacus's optimizer the number of iterations; its values are NaN.

        Args:
            parameters: the trainable parameters.

        Returns:
            Number of samples of every accumulated iteration.
        """
        counts = [samples for samples, _ in self._arrived()]
        for p in parameters:
            parts = [p.detach().new_full((samples, *[1] * p.dim()), torch.nan) for samples in counts]
            p.grad_sample = parts[0] if len(parts) == 1 else parts or None  # type: ignore[attr-defined]
        return counts

    @torch.no_grad()
    def clip_and_accumulate(
        self, parameters: list[nn.Parameter], max_grad_norm: float, *, keep: bool = True
    ) -> torch.Tensor | None:
        """Add ``sum_i min(1, C / |g_i|) g_i`` to ``summed_grad``.

        Args:
            parameters: the trainable parameters.
            max_grad_norm: C.
            keep: whether what has arrived is needed again; if not, it is given up piece by piece.

        Returns:
            Norms of the samples' gradients, shape ``[samples]``.
        """
        every = []
        for samples, found in self._arrived():
            whole = {p: add_up(found[p]) for p in parameters if p in found}
            if not keep:
                found.clear()
            norms = [part.squared_norms().to(torch.promote_types(p.dtype, torch.float32)) for p, part in whole.items()]
            norm = torch.stack([n.to(norms[0].device) for n in norms]).sum(0).sqrt()
            scale = self.plan.scale(samples, self.counts())
            scale = scale.to(norm) if isinstance(scale, torch.Tensor) else scale
            norm = norm * scale
            every.append(norm)
            factors = (max_grad_norm / (norm + _EPS)).clamp(max=1.0) * scale
            for p in parameters:
                part = whole.pop(p, None)
                if part is not None:
                    _accumulate(p, part.weighted_sum(factors.to(p.device)).to(p.dtype))
                elif getattr(p, "summed_grad", None) is None:
                    p.summed_grad = torch.zeros_like(p, requires_grad=False)  # type: ignore[attr-defined]
        return torch.cat(every) if every else None


def _accumulate(p: nn.Parameter, total: torch.Tensor) -> None:
    if getattr(p, "summed_grad", None) is None:
        p.summed_grad = total  # type: ignore[attr-defined]
    else:
        p.summed_grad += total  # type: ignore[attr-defined]


def _form(call: LayerLayout) -> Any:
    return call.inputs, call.output, call.problem

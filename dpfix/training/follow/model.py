"""What the model itself does with the very batch: whether it mixes samples, and what its gradients are without any engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from random import Random
from typing import Any

import torch
from torch import nn

from dpfix.errors import USER_CODE_ERRORS
from dpfix.instrument import pytree
from dpfix.instrument.fixed_randomness import FixedRandomness, outside_states
from dpfix.instrument.gradients import Gradients, norm_of, weighted_sum
from dpfix.instrument.module_state import state_of, traceless
from dpfix.instrument.own_draws import draws_from
from dpfix.instrument.precision import exact_products
from dpfix.instrument.rng import rng_untouched
from dpfix.layout.rows import Rows
from dpfix.training.follow.calls import ModelCall, in_autocast
from dpfix.training.follow.delivery import Exchange
from dpfix.training.follow.judge import rows_gap
from dpfix.training.follow.step import ROUGH, TOLERANCE, RealStep, close

PAIRS = 3
"""Pairs of samples on which a loss that the model computes is looked at."""


class PlainModel:
    """A plain copy of the model, run on the calls of a real step.

    Args:
        copied: the copy, with the parameters of the step.
        step: the step.

    Attributes:
        counts: rows of every person, where each row is a sample of the step and they are clipped as one; else empty.
    """

    def __init__(self, copied: nn.Module, step: RealStep) -> None:
        self.module, self.step = copied, step
        self.counts: tuple[int, ...] = ()
        self._state = state_of(copied)

    @property
    def clipped_as_one(self) -> int:
        """How many are clipped, each as one; -1 if the rows are not those of the persons."""
        counts = self.counts or (1,) * self.step.samples
        return len(counts) if sum(counts) == self.step.samples else -1

    def weights(self, of_each: Sequence[float]) -> list[float]:
        """A weight for every sample of the step, from one for each that is clipped."""
        counts = self.counts or (1,) * self.step.samples
        return [weight for weight, rows in zip(of_each, counts, strict=True) for _ in range(rows)]

    # -------------------------------------------------------------- no output feels another sample

    def mixes(self, exchanges: Sequence[Exchange]) -> tuple[float, Exchange, int] | None:
        """Look for a sample whose output changes when others take the places of the others.

        Args:
            exchanges: which do.

        Returns:
            The relative change, the exchange and the number of the call; ``None`` if nothing changes.
        """
        for number, call in enumerate(self.step.calls):
            if call.layout is None or call.layout.lists:
                continue
            for fixed in (False, True):
                found = self._mixes(call, exchanges, fixed=fixed)
                if found == "draws differ":
                    continue  # the model draws as many numbers as the batch has valid entries: fix them
                if isinstance(found, tuple):
                    return (*found, number)
                break
        return None

    def _mixes(self, call: ModelCall, exchanges: Sequence[Exchange], *, fixed: bool) -> tuple[float, Exchange] | str:
        assert call.layout is not None
        before, after_draws = self._outputs(call, (call.args, call.kwargs), fixed=fixed)
        for exchange in exchanges:
            arguments = exchanged(call, exchange, self.step.samples)
            try:
                after, draws = self._outputs(call, arguments, fixed=fixed)
            except USER_CODE_ERRORS:
                continue  # no legal batch for this model
            if not fixed and not (torch.equal(draws[0], after_draws[0]) and draws[1] == after_draws[1]):
                return "draws differ"
            for (path, a), (_, b) in zip(before, after, strict=True):
                dim = dict(call.layout.output).get(path)
                if dim is None or dim.counts or a.shape != b.shape:
                    continue
                gap = rows_gap(a, b, Rows.of(dim, self.step.samples), exchange.keep)
                if gap:
                    return gap, exchange
        return ""

    def feels_length(self, exchange: Exchange, arguments: Sequence[Any]) -> float:
        """Whether a sample's output depends on the length of the longest sample in the batch.

        Args:
            exchange: other samples, cut to another length.
            arguments: of every call of the model.

        Returns:
            The relative change of the output, up to the shorter length; 0 if there is none.
        """
        for call, other in zip(self.step.calls, arguments, strict=False):
            if call.layout is None or call.layout.lists:
                continue
            try:
                before, _ = self._outputs(call, (call.args, call.kwargs), fixed=True)
                after, _ = self._outputs(call, other, fixed=True)
            except USER_CODE_ERRORS:
                continue
            for (path, a), (_, b) in zip(before, after, strict=True):
                dim = dict(call.layout.output).get(path)
                if dim is None or dim.counts or a.dim() != b.dim() or a.shape[dim.dim] != b.shape[dim.dim]:
                    continue
                common = tuple(slice(0, min(x, y)) for x, y in zip(a.shape, b.shape, strict=True))
                gap = rows_gap(a[common], b[common], Rows.of(dim, self.step.samples), exchange.keep)
                if gap:
                    return gap
        return 0.0

    def run(self, call: ModelCall, around: AbstractContextManager[Any]) -> None:
        """Run the model once more on a call, inside a context; what it cannot do is not seen."""
        with (
            traceless(self.module, self._state),
            torch.no_grad(),
            rng_untouched(),
            around,
            suppress(*USER_CODE_ERRORS),
            drawing_as_in(call),
        ):
            self.module(*call.args, **call.kwargs)

    def _outputs(self, call: ModelCall, arguments: Any, *, fixed: bool) -> tuple[list[Any], tuple[torch.Tensor, int]]:
        args, kwargs = arguments
        with traceless(self.module, self._state), torch.no_grad(), FixedRandomness() if fixed else exact_products():
            with drawing_as_in(call) as state, in_autocast(call.autocast):
                out = self.module(*args, **kwargs)
                after = state(), outside_states()
            return [(p, t) for p, t in pytree.leaves(out) if isinstance(t, torch.Tensor)], after

    # -------------------------------------------------------------- a loss that the model computes is a mean of its samples'

    def couples(self, draw: Random) -> float:
        """Look for a loss which the model computes itself, and which is no mean (or sum) over the samples.

        A batch of copies of two samples has to have the mean of the gradients that batches of copies of either have.

        Args:
            draw: chooses the samples.

        Returns:
            The largest relative difference; 0 if it is rounding.
        """
        worst = 0.0
        for call, gradients in zip(self.step.calls, self.step.gradients, strict=True):
            pairs = zip(call.outputs, gradients, strict=True)
            paths = [self._path(call, o.tensor) for o, g in pairs if o.dim is None and g is not None and bool(g.any())]
            for path in paths:
                for _ in range(PAIRS):
                    worst = max(worst, self._couples(call, path, draw.sample(range(self.step.samples), 2)))
        return worst

    @staticmethod
    def _path(call: ModelCall, tensor: torch.Tensor) -> pytree.Path:
        return next(path for path, t in pytree.leaves(call.result) if t is tensor)

    def _couples(self, call: ModelCall, path: pytree.Path, pair: Sequence[int]) -> float:
        n, (i, j) = self.step.samples, pair
        half = n // 2
        orders = ((i,) * n, (j,) * n, (i,) * half + (j,) * (n - half))
        try:
            one, other, both = (self._gradient_of(call, path, Exchange(order, i)) for order in orders)
        except USER_CODE_ERRORS:
            return 0.0
        share = half / n
        wanted = weighted_sum([one, other], [share, 1 - share])
        size = share * norm_of(one) + (1 - share) * norm_of(other)
        if not size or not math.isfinite(size):
            return 0.0
        gap = norm_of({name: both[name] - wanted[name] for name in wanted}) / size
        dtype = next(self.module.parameters()).dtype
        tolerance = ROUGH if call.autocast else TOLERANCE.get(dtype, ROUGH)
        return 0.0 if gap <= 5 * tolerance else gap

    def _gradient_of(self, call: ModelCall, path: pytree.Path, exchange: Exchange) -> Gradients:
        parameters = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
        args, kwargs = exchanged(call, exchange, self.step.samples)
        with traceless(self.module, self._state), torch.enable_grad(), FixedRandomness(), in_autocast(call.autocast):
            loss = dict(pytree.leaves(self.module(*args, **kwargs)))[path]
            return _backward(parameters, [loss.sum()], [None])

    # -------------------------------------------------------------- gradients without an engine

    def graph(self) -> list[list[torch.Tensor]] | None:
        """The outputs of all calls again, with a graph; ``None`` if they are not those of the step.

        An engine that draws other random numbers than the plain model (``vmap`` with dropout) gives other outputs. Under
        autocast both round to half precision, each in its own way.

        Returns:
            One list of outputs per call.
        """
        made: list[list[torch.Tensor]] = []
        if any(call.autocast for call in self.step.calls):
            return None
        for call in self.step.calls:
            with rng_untouched(), torch.enable_grad(), drawing_as_in(call):
                args, kwargs = pytree.map_leaves(_detached, (call.args, call.kwargs))
                out = self.module(*args, **kwargs)
            leaves = dict(pytree.leaves(out))
            places = [path for path, t in pytree.leaves(call.result) if any(t is o.tensor for o in call.outputs)]
            outputs = [leaves.get(path) for path in places]
            if any(t is None or not t.requires_grad for t in outputs):
                return None
            made.append(outputs)  # type: ignore[arg-type]
        return made

    def is_of_step(self, graph: list[list[torch.Tensor]] | None, closeness: float | None = None) -> bool:
        """Whether outputs are those of the step, up to rounding.

        Args:
            graph: from :meth:`graph`.
            closeness: relative difference that is rounding, if not that of their types.

        Returns:
            False if there are none.
        """
        return graph is not None and all(
            close(out.detach(), output.tensor.detach(), closeness)
            for call, outs in zip(self.step.calls, graph, strict=True)
            for output, out in zip(call.outputs, outs, strict=True)
        )

    def gradient(self, graph: list[list[torch.Tensor]], weights: Sequence[float]) -> Gradients:
        """The weighted sum of the samples' gradients, by ordinary autograd.

        Args:
            graph: from :meth:`graph`.
            weights: one number per sample.

        Returns:
            By parameter name.
        """
        parameters = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
        outputs, given = [], []
        for call, outs, grads in zip(self.step.calls, graph, self.step.gradients, strict=True):
            for output, out, grad in zip(call.outputs, outs, grads, strict=True):
                assert grad is not None
                if output.dim is None:
                    continue  # it is not in the loss, or the sum is not looked at
                rows = Rows.of(output.dim, self.step.samples)
                factor = torch.as_tensor(weights, dtype=grad.dtype, device=grad.device)
                split = rows.split(grad)
                scaled = split * factor.view(-1, *(1,) * (split.dim() - 1))
                chosen = scaled.where(factor.view(-1, *(1,) * (split.dim() - 1)) != 0, 0)
                outputs.append(out)
                given.append(rows.merge(chosen).reshape(grad.shape))
        return _backward(parameters, outputs, given)


def _backward(
    parameters: Mapping[str, torch.Tensor], outputs: Sequence[torch.Tensor], given: Sequence[Any]
) -> Gradients:
    """Gradients by ``backward()``: reentrant checkpoints know no other way."""
    for p in parameters.values():
        p.grad = None
    torch.autograd.backward(outputs, given, retain_graph=True)
    found = {n: _dense(p, p.grad) for n, p in parameters.items()}
    for p in parameters.values():
        p.grad = None
    return found


def _dense(p: torch.Tensor, gradient: torch.Tensor | None) -> torch.Tensor:
    if gradient is None:
        return torch.zeros_like(p)
    return gradient.to_dense() if gradient.is_sparse else gradient


def exchanged(call: ModelCall, exchange: Exchange, samples: int) -> Any:
    """The arguments of a call with other samples."""
    assert call.layout is not None
    dims = dict(call.layout.inputs)

    def leaf_of(path: pytree.Path, leaf: Any) -> Any:
        dim = dims.get(path)
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return leaf.detach() if dim is None else exchange.rows(leaf.detach(), Rows.of(dim, samples))

    return pytree.map_leaves(leaf_of, (call.args, call.kwargs))


def _detached(_: pytree.Path, leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, torch.Tensor) else leaf


@contextmanager
def drawing_as_in(call: ModelCall) -> Iterator[Callable[[], torch.Tensor]]:
    """What runs inside draws from torch's generators what a call of the model has drawn.

    Yields:
        A function that tells the state of the generator on the CPU.
    """
    cpu, cuda = call.state
    if cuda is not None:
        torch.cuda.set_rng_state(cuda)
    with draws_from(cpu) as state:
        yield state

"""``nn.LSTM``, ``nn.GRU`` and ``nn.RNN`` as PyTorch computes them, and their cells.

PyTorch's fused kernel forward; backward, one linear layer's per-sample gradients for each of their weights.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence
from typing_extensions import override

from dpfix.engines.bookkeeping import recurrent_backward
from dpfix.engines.bookkeeping.contributions import Kept, full_precision
from dpfix.engines.bookkeeping.forward import Apply, CompositeForward, OutOfMap
from dpfix.engines.bookkeeping.iteration import RootCall
from dpfix.engines.bookkeeping.layer_rule import Report, plainly
from dpfix.engines.bookkeeping.linear import Linear, outer
from dpfix.engines.functional.workarounds import mapped
from dpfix.layout.rows import Rows, rows_of
from dpfix.layout.sample_dim import SampleDim

_BACKWARD: dict[str, Callable[..., recurrent_backward.Found]] = {
    "LSTM": recurrent_backward.lstm,
    "GRU": recurrent_backward.gru,
    "RNN_TANH": partial(recurrent_backward.simple, relu=False),
    "RNN_RELU": partial(recurrent_backward.simple, relu=True),
}
_LINEAR = Linear()


class Sequence:
    """One layer of a recurrent module in one direction.

    Args:
        suffix: layer and direction, as in the parameters' names.
        rows: where the samples are in tensors of shape ``[steps, batch, features]``.
        report: takes a parameter and a contribution.
        lengths: steps of every sequence, if they differ.
    """

    def __init__(
        self, module: nn.RNNBase, suffix: str, rows: Rows, report: Report, lengths: torch.Tensor | None
    ) -> None:
        names = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if module.bias else [])]
        names += ["weight_hr"] if module.proj_size else []
        self.weights: dict[str, nn.Parameter] = {n: getattr(module, f"{n}_{suffix}") for n in names}
        self.mode, self.rows, self._report, self.lengths = module.mode, rows, report, lengths

    def kernel(self, x: torch.Tensor, h: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """PyTorch's own.

        Args:
            x: shape ``[steps, batch, in]``.
            h: first hidden state, shape ``[batch, out]``.
            c: first cell state, shape ``[batch, hidden]``.

        Returns:
            Outputs (zero behind the end of a sequence), last hidden state, last cell state.
        """
        run = getattr(torch._VF, self.mode.lower())  # type: ignore[attr-defined]
        weights = [w.detach() for w in self.weights.values()]
        settings = (weights, "bias_ih" in self.weights, 1, 0.0, False, False)
        state = (h[None], c[None]) if self.mode == "LSTM" else h[None]
        if self.lengths is None:
            out, *last = run(x, state, *settings, False)
            return out, *(s[0].clone() for s in last), *([c.clone()] if self.mode != "LSTM" else [])
        order = self.lengths.argsort(descending=True, stable=True)
        back, lengths = order.argsort(), self.lengths[order]
        data, sizes = torch._VF._pack_padded_sequence(x[:, order], lengths, False)  # type: ignore[attr-defined]
        state = tuple(s[:, order] for s in state) if isinstance(state, tuple) else state[:, order]
        data, *last = run(data, sizes, state, *settings)
        out, _ = torch._VF._pad_packed_sequence(data, sizes, False, 0.0, len(x))  # type: ignore[attr-defined]
        return out[:, back], *(s[0][back] for s in last), *([c.clone()] if self.mode != "LSTM" else [])

    def report(self, p: recurrent_backward.Pass, found: recurrent_backward.Found) -> None:
        """Report the contributions of the linear maps.

        Args:
            p: the layer after its forward pass.
            found: its gradients.
        """
        ih, hh = self.rows.matrices(found.ih), self.rows.matrices(found.hh)
        pairs = {"weight_ih": (p.x, ih), "weight_hh": (p.previous, hh)}
        if found.hr is not None:
            pairs["weight_hr"] = (found.hr[0], self.rows.matrices(found.hr[1]))
        for name, (source, g) in pairs.items():
            if self.weights[name].requires_grad:
                self._report(self.weights[name], outer(self.rows.matrices(source), g, self.weights[name].shape))
        for name, g in (("bias_ih", ih), ("bias_hh", hh)):
            if name in self.weights and self.weights[name].requires_grad:
                self._report(self.weights[name], Kept(full_precision(g).sum(1)))


class Direction(torch.autograd.Function):
    """A :class:`Sequence` in the graph."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, x: torch.Tensor, h: torch.Tensor, c: torch.Tensor, anchor: torch.Tensor, sequence: Sequence
    ) -> Any:
        found = sequence.kernel(x, h, c)
        ctx.sequence = sequence
        ctx.save_for_backward(x, h, c, found[0], *sequence.weights.values())
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g_out: torch.Tensor, g_h: torch.Tensor, g_c: torch.Tensor) -> Any:  # noqa: D102
        x, h, c, out, *weights = (full_precision(t.detach()) for t in ctx.saved_tensors)
        sequence: Sequence = ctx.sequence
        p = recurrent_backward.Pass(x, h, c, out, dict(zip(sequence.weights, weights, strict=True)))
        g_out, g_h, g_c = g_out.to(out.dtype, copy=True), full_precision(g_h), full_precision(g_c)
        cells = g_c[None]
        if sequence.lengths is None:
            g_out[-1] += g_h
        else:  # the last state of a sequence is the output of its last step
            ends = (sequence.lengths.to(x.device) - 1, torch.arange(x.shape[1], device=x.device))
            cells = g_c.new_zeros(len(x), *g_c.shape)
            cells[ends], g_out[ends] = g_c, g_out[ends] + g_h
        found = _BACKWARD[sequence.mode](p, g_out, cells)
        sequence.report(p, found)
        return found.ih @ p.weights["weight_ih"], found.first, found.cell, None, None


class RecurrentForward(CompositeForward):
    """For ``nn.LSTM``, ``nn.GRU`` and ``nn.RNN`` with any number of layers, in one or both directions."""

    @override
    @staticmethod
    def accepts(module: nn.Module) -> bool:
        """Whether it can be taken apart into layers and directions."""
        plain = plainly(module, nn.LSTM, nn.GRU, nn.RNN) and not parametrize.is_parametrized(module)
        return plain and all(isinstance(getattr(module, n), nn.Parameter) for n in module._flat_weights_names)  # type: ignore

    @override
    @staticmethod
    def on_the_batch(module: Any, dims: SequenceOf[SampleDim]) -> bool:
        return dims[0].dim == (0 if module.batch_first else 1)

    @override
    def recorded(self, call: RootCall, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module: Any = self.module
        x, states = _bound(*args, **kwargs)
        if isinstance(x, PackedSequence):
            self.handle.layout(self.path, number)  # refuses rows in another order than the samples
            if int(x.batch_sizes[0]) != call.samples:
                raise NotImplementedError("a recurrent layer was called with several packed sequences per sample")
            return self._packed(call, x, states)
        layout = self.input_dim(number)
        if x.dim() != 3 or layout is None or layout.dim != (0 if module.batch_first else 1):
            raise NotImplementedError("a recurrent layer was called without a batch of samples")
        where = rows_of(x, layout, call.samples)
        out, last = self._layers(call, replace(where, dim=1), x.transpose(0, 1) if module.batch_first else x, states)
        return out.transpose(0, 1) if module.batch_first else out, last

    @override
    def inside(self, call: RootCall, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module: Any = self.module
        x, states = _bound(*args, **kwargs)
        if isinstance(x, PackedSequence) or x.dim() != 3:
            raise NotImplementedError("a recurrent layer was called one sample at a time without a batch")
        given = () if states is None else states if isinstance(states, tuple) else (states,)

        def whole(samples: int, x: torch.Tensor, *states: torch.Tensor) -> Any:
            # [samples, time, rows, features] to [time, samples * rows, features]
            x, *states = (t.movedim(0, 1).flatten(1, 2) for t in (x, *states))  # type: ignore[assignment]
            out, last = self._layers(call, Rows(samples, 1), x, _one_or_several(states))
            found = (out, *last) if isinstance(last, tuple) else (out, last)
            return tuple(t.unflatten(1, (samples, -1)).movedim(1, 0) for t in found)

        x = x.transpose(0, 1) if module.batch_first else x
        out, *last = OutOfMap.apply(whole, mapped(x), *given)
        return out.transpose(0, 1) if module.batch_first else out, _one_or_several(last)

    def _packed(self, call: RootCall, x: PackedSequence, states: Any) -> Any:
        padded, lengths = pad_packed_sequence(x)  # in the order of the samples
        out, last = self._layers(call, Rows(call.samples, 1), padded, states, lengths)
        if x.sorted_indices is not None:
            out, lengths = out[:, x.sorted_indices], lengths[x.sorted_indices.to(lengths.device)]
        data, _ = torch._VF._pack_padded_sequence(out, lengths, False)  # type: ignore[attr-defined]
        return PackedSequence(data, x.batch_sizes, x.sorted_indices, x.unsorted_indices), last

    def _layers(
        self, call: RootCall, where: Rows, x: torch.Tensor, states: Any, lengths: torch.Tensor | None = None
    ) -> Any:
        module: Any = self.module
        report, several = call.reporter(call.samples), module.mode == "LSTM"
        ways = ("", "_reverse") if module.bidirectional else ("",)
        widths = (module.proj_size or module.hidden_size, module.hidden_size)
        if states is None:
            first = [x.new_zeros(module.num_layers * len(ways), x.shape[1], width) for width in widths]
        else:
            first = list(states) if several else [states, states]
        last: list[tuple[torch.Tensor, ...]] = []
        for layer in range(module.num_layers):
            outs = []
            for way in ways:
                sequence = Sequence(module, f"l{layer}{way}", where, report, lengths)
                h, c = (states[len(last)] for states in first)
                c = c if several else c.detach()
                out, *final = Direction.apply(_turned(x, lengths) if way else x, h, c, self.handle.anchor, sequence)
                outs.append(_turned(out, lengths) if way else out)
                last.append(tuple(final))
            x = torch.cat(outs, 2) if len(outs) > 1 else outs[0]
            if module.dropout and layer + 1 < module.num_layers:
                x = torch.dropout(x, module.dropout, module.training)
        hidden, cell = (torch.stack(s) for s in zip(*last, strict=True))
        x = x.clone() if x is outs[-1] else x  # what the backward pass needs is not the caller's to overwrite
        return x, (hidden, cell) if several else hidden


def _turned(x: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    """Every sequence backwards, shape ``[steps, batch, features]``; what is behind its end stays there."""
    if lengths is None:
        return x.flip(0)
    step, length = torch.arange(len(x), device=x.device)[:, None], lengths.to(x.device)
    place = torch.where(step < length, length - 1 - step, step)
    return x.gather(0, place[..., None].expand(x.shape))


def _one_or_several(states: list[torch.Tensor] | tuple[torch.Tensor, ...]) -> Any:
    """First or last states as PyTorch takes and gives them."""
    return tuple(states) if len(states) > 1 else next(iter(states), None)


def _bound(input: Any, hx: Any = None) -> tuple[Any, Any]:
    return input, hx


class CellForward(CompositeForward):
    """For ``nn.LSTMCell``, ``nn.GRUCell`` and ``nn.RNNCell``: two linear layers, and PyTorch's autograd for the rest."""

    @override
    @staticmethod
    def accepts(module: nn.Module) -> bool:
        return plainly(module, nn.LSTMCell, nn.GRUCell, nn.RNNCell)

    @override
    def recorded(self, call: RootCall, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, state = _bound(*args, **kwargs)
        layout = self.input_dim(number)
        if x.dim() != 2 or layout is None or layout.dim != 0:
            raise NotImplementedError("a recurrent cell was called without a batch of samples")
        return self._step(self.rules_in(call), x, state, rows_of(x, layout, call.samples))

    @override
    def inside(self, call: RootCall, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, state = _bound(*args, **kwargs)
        return self._step(self.rules_in(call), x, state, None)

    def _step(self, apply: Apply, x: torch.Tensor, state: Any, where: Rows | None) -> Any:
        module: Any = self.module
        kind = "LSTM" if isinstance(module, nn.LSTMCell) else getattr(module, "nonlinearity", "GRU")
        if state is None:
            state = x.new_zeros(*x.shape[:-1], module.hidden_size)
            state = (state, state) if kind == "LSTM" else state
        hidden = state[0] if kind == "LSTM" else state
        own = {n: (getattr(module, f"weight_{n}"), getattr(module, f"bias_{n}")) for n in ("ih", "hh")}
        ih, hh = (
            apply(_LINEAR, module, t, where, weight=own[n][0], bias=own[n][1]) for t, n in ((x, "ih"), (hidden, "hh"))
        )
        return recurrent_backward.cell_step(kind, ih, hh, state)

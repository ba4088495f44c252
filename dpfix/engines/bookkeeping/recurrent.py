"""``nn.LSTM`` as PyTorch computes it: the fused kernel forward, one linear layer's per-sample gradients backward.

With the output known, every step's gates are one product over all steps; what remains of the backward pass is a short
recurrence. Then input-to-hidden and hidden-to-hidden weights are linear layers on ``x`` and on the previous output.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from dpfix.engines.bookkeeping.contributions import Kept, full_precision
from dpfix.engines.bookkeeping.layers import StandIn
from dpfix.engines.bookkeeping.linear import outer
from dpfix.engines.bookkeeping.rows import Rows, rows_of

if TYPE_CHECKING:
    from dpfix.engines.bookkeeping.handle import RootCall

_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def known_lstm(module: nn.Module) -> bool:
    """Whether it is an LSTM that can be taken apart into layers and directions.

    Args:
        module: a module.

    Returns:
        Whether it is.
    """
    plain = isinstance(module, nn.LSTM) and type(module).forward is nn.LSTM.forward
    return plain and not module.proj_size  # type: ignore[union-attr]


class Direction(torch.autograd.Function):
    """One layer of an LSTM in one direction."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, x: torch.Tensor, h: torch.Tensor, c: torch.Tensor, anchor: torch.Tensor, owner: Any
    ) -> Any:
        weights = [w.detach() for w in owner.weights]
        out, hn, cn = torch._VF.lstm(  # type: ignore[attr-defined]
            x, (h[None], c[None]), weights, len(weights) == 4, 1, 0.0, False, False, False
        )
        ctx.owner = owner
        ctx.save_for_backward(x, h, c, out, *owner.weights)
        return out, hn[0].clone(), cn[0].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g_out: torch.Tensor, g_h: torch.Tensor, g_c: torch.Tensor) -> Any:  # noqa: D102
        x, h, c, out, *weights = (t.detach() for t in ctx.saved_tensors)
        previous = torch.cat([h[None], out[:-1]])
        gates, g_h, g_c = gate_gradients(x, previous, c, weights, (g_out, g_h, g_c))
        ctx.owner.report(x, previous, gates)
        return gates @ weights[0], g_h, g_c, None, None


def gate_gradients(
    x: torch.Tensor, previous: torch.Tensor, c: torch.Tensor, weights: list[torch.Tensor], g: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the gates before their non-linearities.

    Args:
        x: input, shape ``[steps, batch, in]``.
        previous: hidden states before every step, shape ``[steps, batch, hidden]``.
        c: first cell state, shape ``[batch, hidden]``.
        weights: input-to-hidden and hidden-to-hidden weight, and their biases if there are any.
        g: gradients of all outputs, of the last hidden and of the last cell state.

    Returns:
        Shape ``[steps, batch, 4 * hidden]``, and the gradients of the first hidden and cell state.
    """
    gates = x @ weights[0].mT + previous @ weights[1].mT
    if len(weights) == 4:
        gates += weights[2] + weights[3]
    i, f, z, o = gates.chunk(4, -1)
    i, f, z, o = i.sigmoid(), f.sigmoid(), z.tanh(), o.sigmoid()
    cells = [c]
    for t in range(len(x)):
        cells.append(torch.addcmul(i[t] * z[t], f[t], cells[-1]))
    before, squashed = torch.stack(cells[:-1]), torch.stack(cells[1:]).tanh_()
    to_cell = o * (1 - squashed * squashed)  # d out / d cell
    slopes = torch.cat([z * i * (1 - i), before * f * (1 - f), i * (1 - z * z)], -1)  # d cell / d gates
    to_output = squashed * o * (1 - o)  # d out / d output gate
    g_out, g_h, g_c = g
    found, hidden = gates, c.shape[-1]
    for t in range(len(x) - 1, -1, -1):
        g_h = g_out[t] + g_h
        g_c = torch.addcmul(g_c, g_h, to_cell[t])
        torch.mul(g_c.repeat(1, 3), slopes[t], out=found[t][:, : 3 * hidden])
        torch.mul(g_h, to_output[t], out=found[t][:, 3 * hidden :])
        g_h = found[t] @ weights[1]
        g_c = g_c * f[t]
    return found, g_h, g_c


class _Owner:
    """The parameters of one layer and direction, and where their gradients are reported.

    Args:
        module: the LSTM.
        suffix: layer and direction, as in the parameters' names.
        rows: where the samples are in tensors of shape ``[steps, batch, features]``.
        report: takes a parameter and a contribution.
    """

    def __init__(self, module: nn.LSTM, suffix: str, rows: Rows, report: Any) -> None:
        names = _NAMES if module.bias else _NAMES[:2]
        self.weights: list[nn.Parameter] = [getattr(module, f"{name}_{suffix}") for name in names]
        self.rows, self._report = rows, report

    def report(self, x: torch.Tensor, previous: torch.Tensor, gates: torch.Tensor) -> None:
        """Report the contributions of both linear maps.

        Args:
            x: inputs, shape ``[steps, batch, in]``.
            previous: previous outputs, shape ``[steps, batch, hidden]``.
            gates: gradients of the gates, shape ``[steps, batch, 4 * hidden]``.
        """
        by_sample = self.rows.matrices(gates)
        for weight, source in zip(self.weights[:2], (x, previous), strict=True):
            if weight.requires_grad:
                self._report(weight, outer(self.rows.matrices(source), by_sample, weight.shape))
        for bias in self.weights[2:]:
            if bias.requires_grad:
                self._report(bias, Kept(full_precision(by_sample).sum(1)))


class LSTMStandIn(StandIn):
    """For ``nn.LSTM`` with any number of layers, in one or both directions."""

    def recorded(self, call: RootCall, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The LSTM, layer by layer.

        Args:
            call: the model's call.
            number: how many calls of this module came before in the step.
            args: the input, and perhaps the first states.
            kwargs: the same by keyword.

        Returns:
            Output, and the last hidden and cell states.

        Raises:
            NotImplementedError: the input is a packed sequence, or has no batch.
        """
        module: Any = self.module
        x, states = _bound(*args, **kwargs)
        if isinstance(x, PackedSequence) or x.dim() != 3:
            raise NotImplementedError("an LSTM was called with a packed sequence, or without a batch")
        layout = self.handle.layout(self.path, number).inputs[0][1]
        if layout is None or layout.dim != (0 if module.batch_first else 1):
            raise NotImplementedError("an LSTM was called with the samples in its time dimension")
        where = rows_of(x, layout, call.samples)
        rows, report = Rows(where.samples, 1, where.interleaved), call.iteration.reporter(call.samples)
        x = x.transpose(0, 1) if module.batch_first else x
        ways = ("", "_reverse") if module.bidirectional else ("",)
        if states is None:
            empty = x.new_zeros(module.num_layers * len(ways), x.shape[1], module.hidden_size)
            states = (empty, empty)
        last: list[tuple[torch.Tensor, torch.Tensor]] = []
        for layer in range(module.num_layers):
            outs = []
            for way in ways:
                owner = _Owner(module, f"l{layer}{way}", rows, report)
                h, c = states[0][len(last)], states[1][len(last)]
                out, hn, cn = Direction.apply(x.flip(0) if way else x, h, c, self.handle.anchor, owner)
                outs.append(out.flip(0) if way else out)
                last.append((hn, cn))
            x = torch.cat(outs, 2) if len(outs) > 1 else outs[0]
            if module.dropout and layer + 1 < module.num_layers:
                x = torch.dropout(x, module.dropout, module.training)
        hidden, cell = (torch.stack(s) for s in zip(*last, strict=True))
        return x.transpose(0, 1) if module.batch_first else x, (hidden, cell)


def _bound(input: torch.Tensor, hx: Any = None) -> tuple[Any, Any]:
    return input, hx

"""The backward passes of recurrent layers, down to the gradients of their linear maps.

With the outputs known, the gates of all steps are one product; what remains of the backward pass is a short elementwise
recurrence. Input-to-hidden and hidden-to-hidden weights are then linear layers on the inputs and on the previous outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Pass:
    """One layer in one direction after its forward pass.

    Attributes:
        x: inputs, shape ``[steps, batch, in]``.
        first: hidden state before the first step, shape ``[batch, out]``.
        cell: cell state before the first step (LSTM), shape ``[batch, hidden]``.
        out: outputs of all steps, shape ``[steps, batch, out]``.
        weights: input-to-hidden and hidden-to-hidden weight, their biases if there are any, the projection if there is one.
    """

    x: torch.Tensor
    first: torch.Tensor
    cell: torch.Tensor
    out: torch.Tensor
    weights: dict[str, torch.Tensor]

    @property
    def previous(self) -> torch.Tensor:
        """Outputs of the step before, shape ``[steps, batch, out]``."""
        return torch.cat([self.first[None], self.out[:-1]])

    def gates(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What the two linear maps give, shape ``[steps, batch, gates]`` each."""
        pair = (self.x, "ih"), (self.previous, "hh")
        return tuple(
            torch.nn.functional.linear(t, self.weights[f"weight_{n}"], self.weights.get(f"bias_{n}")) for t, n in pair
        )  # type: ignore[return-value]


@dataclass(frozen=True)
class Found:
    """Gradients of one layer in one direction.

    Attributes:
        ih: of the output of the input-to-hidden map, shape ``[steps, batch, gates]``.
        hh: of the output of the hidden-to-hidden map, the same shape.
        first: of the first hidden state.
        cell: of the first cell state.
        hr: input and output gradient of the projection (LSTM with ``proj_size``).
    """

    ih: torch.Tensor
    hh: torch.Tensor
    first: torch.Tensor
    cell: torch.Tensor | None = None
    hr: tuple[torch.Tensor, torch.Tensor] | None = None


def lstm(p: Pass, g_out: torch.Tensor, g_cells: torch.Tensor) -> Found:
    """``nn.LSTM``.

    Args:
        p: the layer after its forward pass.
        g_out: gradients of the outputs, shape ``[steps, batch, out]``.
        g_cells: gradients of the cell states after each step, or of the last one, shape ``[1 or steps, batch, hidden]``.

    Returns:
        The gradients.
    """
    gates = torch.add(*p.gates())
    hidden = gates.shape[-1] // 4
    i, f, z, o = gates.chunk(4, -1)
    i, f, z, o = i.sigmoid(), f.sigmoid(), z.tanh(), o.sigmoid()
    cells = [p.cell]
    for t in range(len(i)):
        cells.append(torch.addcmul(i[t] * z[t], f[t], cells[-1]))
    before, squashed = torch.stack(cells[:-1]), torch.stack(cells[1:]).tanh_()
    raw = o * squashed  # the output before the projection
    to_cell = o - raw * squashed  # d out / d cell
    slopes = torch.cat([z * i * (1 - i), before * f * (1 - f), i * (1 - z * z)], -1)  # d cell / d gates
    to_output = raw * (1 - o)  # d out / d output gate
    projection, weight = p.weights.get("weight_hr"), p.weights["weight_hh"]
    g_h, g_c, g_all = torch.zeros_like(p.first), g_cells[-1], []
    for t in range(len(gates) - 1, -1, -1):
        g_h = g_out[t] + g_h
        if projection is not None:
            g_all.append(g_h)
            g_h = g_h @ projection
        g_c = torch.addcmul(g_c, g_h, to_cell[t])
        torch.mul(g_c.repeat(1, 3), slopes[t], out=gates[t][:, : 3 * hidden])
        torch.mul(g_h, to_output[t], out=gates[t][:, 3 * hidden :])
        g_h = gates[t] @ weight
        g_c = g_c * f[t] if t == 0 or len(g_cells) == 1 else torch.addcmul(g_cells[t - 1], g_c, f[t])
    projected = None if projection is None else (raw, torch.stack(g_all[::-1]))
    return Found(gates, gates, g_h, g_c, projected)


def gru(p: Pass, g_out: torch.Tensor, g_cells: torch.Tensor) -> Found:
    """``nn.GRU``.

    Args:
        p: the layer after its forward pass.
        g_out: gradients of the outputs, shape ``[steps, batch, out]``.
        g_cells: not used.

    Returns:
        The gradients.
    """
    (xr, xz, xn), (hr, hz, hn) = (t.chunk(3, -1) for t in p.gates())
    r, z = (xr + hr).sigmoid_(), (xz + hz).sigmoid_()
    n = torch.addcmul(xn, r, hn).tanh_()
    to_n = (1 - z) * (1 - n * n)  # d out / d (new gate before tanh)
    slopes = torch.cat([to_n * hn * r * (1 - r), (p.previous - n) * z * (1 - z), to_n * r], -1)
    g_h, g_all, found = torch.zeros_like(p.first), torch.empty_like(g_out), torch.empty_like(slopes)
    for t in range(len(z) - 1, -1, -1):
        torch.add(g_out[t], g_h, out=g_all[t])
        torch.mul(g_all[t].repeat(1, 3), slopes[t], out=found[t])
        g_h = torch.addcmul(found[t] @ p.weights["weight_hh"], g_all[t], z[t])
    to_input = torch.cat([found[..., : 2 * z.shape[-1]], g_all * to_n], -1)
    return Found(to_input, found, g_h)


def simple(p: Pass, g_out: torch.Tensor, g_cells: torch.Tensor, *, relu: bool) -> Found:
    """``nn.RNN``.

    Args:
        p: the layer after its forward pass.
        g_out: gradients of the outputs, shape ``[steps, batch, out]``.
        g_cells: not used.
        relu: whether the non-linearity is ReLU instead of tanh.

    Returns:
        The gradients.
    """
    slopes = (p.out > 0).to(p.out.dtype) if relu else 1 - p.out * p.out
    g_h, found = torch.zeros_like(p.first), torch.empty_like(slopes)
    for t in range(len(slopes) - 1, -1, -1):
        torch.mul(g_out[t] + g_h, slopes[t], out=found[t])
        g_h = found[t] @ p.weights["weight_hh"]
    return Found(found, found, g_h)


def cell_step(kind: str, x: torch.Tensor, h: torch.Tensor, state: Any) -> Any:
    """One step of ``nn.LSTMCell``, ``nn.GRUCell`` or ``nn.RNNCell`` after its linear maps.

    Args:
        kind: ``LSTM``, ``GRU``, ``tanh`` or ``relu``.
        x: output of the input-to-hidden map.
        h: output of the hidden-to-hidden map.
        state: hidden state before the step; with the cell state for an LSTM.

    Returns:
        The next state.
    """
    if kind == "LSTM":
        i, f, z, o = (x + h).chunk(4, -1)
        cell = f.sigmoid() * state[1] + i.sigmoid() * z.tanh()
        return o.sigmoid() * cell.tanh(), cell
    if kind == "GRU":
        (xr, xz, xn), (hr, hz, hn) = x.chunk(3, -1), h.chunk(3, -1)
        z, n = (xz + hz).sigmoid(), torch.tanh(xn + (xr + hr).sigmoid() * hn)
        return n + z * (state - n)
    return torch.relu(x + h) if kind == "relu" else torch.tanh(x + h)

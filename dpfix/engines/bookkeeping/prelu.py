"""``nn.PReLU``."""

from __future__ import annotations

import torch
from torch import nn
from typing_extensions import override

from dpfix.engines.bookkeeping.contributions import Kept, full_precision
from dpfix.engines.bookkeeping.layer_rule import LayerCall, LayerRule, plainly

Saved = tuple[torch.Tensor | None, ...]


class PReLU(LayerRule):
    """``nn.PReLU``: the slope of a channel gets what came back where its input was negative."""

    @override
    def accepts(self, module: nn.Module) -> bool:
        return plainly(module, nn.PReLU)

    @override
    def forward(self, call: LayerCall, x: torch.Tensor) -> tuple[torch.Tensor, Saved]:
        """``max(0, x) + weight min(0, x)`` for inputs of shape ``[rows, channels, ...]``."""
        assert call.weight is not None
        return torch.prelu(x, call.weight.to(x.dtype)), (x, call.weight)

    @override
    def backward(
        self, call: LayerCall, saved: tuple[torch.Tensor, ...], g: torch.Tensor, wanted: bool
    ) -> torch.Tensor | None:
        x, weight = saved
        channels = weight.numel()
        per_channel = weight.to(x.dtype).view(-1, *[1] * max(0, x.dim() - 2))
        gx, slope = torch.ops.aten._prelu_kernel_backward(g, x, per_channel)
        if call.trains("weight"):
            by_sample = call.rows.adjacent(full_precision(slope))
            rows = by_sample.reshape(call.rows.samples, -1, channels, slope[0].numel() // channels)
            call.report("weight", Kept(rows.sum((1, 3))))
        return gx if wanted else None

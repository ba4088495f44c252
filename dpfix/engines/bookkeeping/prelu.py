"""``nn.PReLU``."""

from __future__ import annotations

import torch
from torch import nn

from dpfix.engines.bookkeeping.contributions import Kept, full_precision
from dpfix.engines.bookkeeping.layer_rule import LayerCall, LayerRule, plainly

Saved = tuple[torch.Tensor | None, ...]


class PReLU(LayerRule):
    """``nn.PReLU``: the slope of a channel gets what came back where its input was negative."""

    def accepts(self, module: nn.Module) -> bool:
        """Whether it is a PReLU with PyTorch's own forward.

        Args:
            module: a module.

        Returns:
            Whether it is.
        """
        return plainly(module, nn.PReLU)

    def forward(self, call: LayerCall, x: torch.Tensor) -> tuple[torch.Tensor, Saved]:
        """``max(0, x) + weight min(0, x)``.

        Args:
            call: the call.
            x: shape ``[rows, channels, ...]``.

        Returns:
            The same shape; input and weight are kept.
        """
        assert call.weight is not None
        return torch.prelu(x, call.weight.to(x.dtype)), (x, call.weight)

    def backward(
        self, call: LayerCall, saved: tuple[torch.Tensor, ...], g: torch.Tensor, wanted: bool
    ) -> torch.Tensor | None:
        """See :class:`LayerRule`.

        Args:
            call: the call.
            saved: input and weight.
            g: gradient of the output.
            wanted: whether the input's gradient is needed.

        Returns:
            The gradient of the input.
        """
        x, weight = saved
        channels = weight.numel()
        per_channel = weight.to(x.dtype).view(-1, *[1] * max(0, x.dim() - 2))
        gx, slope = torch.ops.aten._prelu_kernel_backward(g, x, per_channel)
        if call.trains("weight"):
            by_sample = call.rows.adjacent(full_precision(slope))
            rows = by_sample.reshape(call.rows.samples, -1, channels, slope[0].numel() // channels)
            call.report("weight", Kept(rows.sum((1, 3))))
        return gx if wanted else None

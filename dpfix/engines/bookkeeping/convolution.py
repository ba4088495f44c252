"""Convolutions and transposed convolutions in one, two and three dimensions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from typing_extensions import override

from dpfix.engines.bookkeeping.autotune import Autotune
from dpfix.engines.bookkeeping.contributions import Kept, full_precision
from dpfix.engines.bookkeeping.convolution_costs import Geometry
from dpfix.engines.bookkeeping.convolution_norms import correlation
from dpfix.engines.bookkeeping.layer_rule import LayerCall, LayerRule, autocast, plainly

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Convolution(LayerRule):
    """``nn.Conv1d`` to ``nn.Conv3d`` with every padding, and ``nn.ConvTranspose1d`` to ``nn.ConvTranspose3d``."""

    def __init__(self) -> None:
        self._autotune = Autotune()

    @override
    def accepts(self, module: nn.Module) -> bool:
        return plainly(module, *_CONVOLUTIONS, *_TRANSPOSED)

    @override
    def prepare(self, module: Any, x: torch.Tensor) -> torch.Tensor:
        """Pad what the convolution itself cannot: values other than zeros, or more on one side."""
        if x.dim() != len(module.kernel_size) + 2:
            raise NotImplementedError(
                f"a convolution was called with a tensor of {x.dim()} dimensions, without a batch"
            )
        if isinstance(module, _ConvTransposeNd) or symmetric(module) is not None:
            return x
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        return F.pad(x, module._reversed_padding_repeated_twice, mode=mode)

    @override
    def forward(self, call: LayerCall, x: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]:
        """From ``[rows, channels, *in]`` to ``[rows, filters, *out]``."""
        assert call.weight is not None
        x, weight, bias = autocast(x, call.weight, call.bias)
        return torch.ops.aten.convolution(x, weight, bias, *settings(call.module)), (x, weight)

    @override
    def backward(
        self, call: LayerCall, saved: tuple[torch.Tensor, ...], g: torch.Tensor, wanted: bool
    ) -> torch.Tensor | None:
        x, weight = saved
        by_sample = call.rows.adjacent(g)
        rows = len(by_sample) // call.rows.samples
        if call.trains("bias"):
            sums = full_precision(by_sample).sum(tuple(range(2, by_sample.dim())))
            call.report("bias", Kept(sums if rows == 1 else sums.view(call.rows.samples, rows, -1).sum(1)))
        if call.trains("weight"):
            stride, padding, dilation, transposed, _, groups = settings(call.module)
            pair = (call.rows.adjacent(x), by_sample)
            source, target = pair[::-1] if transposed else pair
            geometry = Geometry(stride, padding, dilation, groups)
            call.report("weight", correlation(source, target, weight.shape, geometry, rows, self._autotune))
        if not wanted:
            return None
        return torch.ops.aten.convolution_backward(g, x, weight, None, *settings(call.module), [True, False, False])[0]


def symmetric(module: Any) -> tuple[int, ...] | None:
    """Zero padding that is the same on both sides.

    Returns:
        The padding, or ``None`` if the input has to be padded first.
    """
    if module.padding_mode != "zeros":
        return None
    if not isinstance(module.padding, str):
        return module.padding
    if module.padding == "valid":
        return (0,) * len(module.kernel_size)
    total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    return None if any(t % 2 for t in total) else tuple(t // 2 for t in total)


def settings(module: _ConvNd) -> tuple[Any, ...]:
    """The arguments of the convolution after the padding that was already done.

    Returns:
        Stride, padding, dilation, transposed, output padding, groups.
    """
    none = (0,) * len(module.kernel_size)
    padding = symmetric(module) if not module.transposed else module.padding
    return (
        module.stride,
        padding or none,
        module.dilation,
        module.transposed,
        module.output_padding,
        module.groups,
    )

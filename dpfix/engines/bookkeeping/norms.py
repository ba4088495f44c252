"""Normalisation layers: the per-sample gradient of scale and shift is one number per feature.

They differ in the statistics and in where the features are; what is common to all of them stands in :class:`Norm`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from typing_extensions import override

from dpfix.engines.bookkeeping.blocks import by_sample
from dpfix.engines.bookkeeping.contributions import Kept, full_precision
from dpfix.engines.bookkeeping.layer_rule import LayerCall, LayerRule, plainly

_LOOP_ABOVE = 16384
"""Numbers per sample from which one kernel per sample is faster on a processor than a product over all of them."""

Saved = tuple[torch.Tensor | None, ...]
Gradients = tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]
"""Gradient of the input, and of scale and shift for every sample."""


class Norm(LayerRule):
    """What the normalisations share.

    Args:
        *kinds: the classes it is for.
        features: see :class:`LayerRule`.
    """

    def __init__(self, *kinds: type[nn.Module], features: int | None = None) -> None:
        self.kinds, self.features = kinds, features

    @override
    def accepts(self, module: nn.Module) -> bool:
        """Not with running statistics, which are those of other samples."""
        return plainly(module, *self.kinds) and not getattr(module, "track_running_stats", False)

    @override
    def prepare(self, module: Any, x: torch.Tensor) -> torch.Tensor:
        """Statistics are computed in single precision at least."""
        return full_precision(x)

    @override
    def finish(self, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Back to the input's precision, unless autocast keeps normalisations in single precision (CUDA)."""
        kept = x.is_cuda and torch.is_autocast_enabled("cuda")
        return output if kept or output.dtype == x.dtype else output.to(x.dtype)

    @override
    def backward(
        self, call: LayerCall, saved: tuple[torch.Tensor, ...], g: torch.Tensor, wanted: bool
    ) -> torch.Tensor | None:
        gradient, *found = self.gradients(call, saved, g, wanted)
        for name, per_sample in zip(("weight", "bias"), found, strict=True):
            if call.trains(name):
                shape = (call.rows.samples, *getattr(call, name).shape)
                call.report(name, Kept(per_sample if per_sample.shape == shape else per_sample.reshape(shape)))
        return gradient

    @abstractmethod
    def gradients(self, call: LayerCall, saved: tuple[torch.Tensor, ...], g: torch.Tensor, wanted: bool) -> Gradients:
        """All gradients of one call.

        Args:
            saved: what :meth:`forward` kept.
            g: gradient of the output.
            wanted: whether the input's gradient is needed.

        Returns:
            Gradient of the input (if wanted), and of scale and shift for every sample.
        """


def precise_parameters(call: LayerCall) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The parameters in the precision of the statistics; those of a model that FSDP computes in half precision have less."""
    return tuple(t if t is None else full_precision(t) for t in (call.weight, call.bias))  # type: ignore[return-value]


def per_sample(call: LayerCall, by_row: torch.Tensor) -> torch.Tensor:
    """Add up the rows of every sample.

    Args:
        by_row: shape ``[rows, channels]``, in the order of the layer's input.

    Returns:
        Shape ``[samples, channels]``.
    """
    rows = call.rows.adjacent(by_row)
    return rows if len(rows) == call.rows.samples else rows.view(call.rows.samples, -1, by_row.shape[1]).sum(1)


class GroupNorm(Norm):
    """``nn.GroupNorm``, and ``nn.InstanceNorm1d`` to ``nn.InstanceNorm3d``, whose groups are single channels.

    Seen as one sample with ``samples * groups`` groups and its own weights for every sample, PyTorch's own kernel
    gives the per-sample gradients and the input gradient in one pass.
    """

    @override
    def prepare(self, module: Any, x: torch.Tensor) -> torch.Tensor:
        if isinstance(module, _InstanceNorm) and x.dim() == module._get_no_batch_dim():
            raise NotImplementedError("an instance normalisation was called without a batch")
        return full_precision(x)

    @override
    def forward(self, call: LayerCall, x: torch.Tensor) -> tuple[torch.Tensor, Saved]:
        """Normalise over the groups, shape ``[rows, channels, *spatial]``."""
        rows, channels = x.shape[:2]
        groups, x = getattr(call.module, "num_groups", channels), x.contiguous()
        weight, bias = precise_parameters(call)
        out, mean, rstd = torch.ops.aten.native_group_norm(
            x, weight, bias, rows, channels, math.prod(x.shape[2:]), groups, call.module.eps
        )
        return out, (x, weight, mean, rstd)

    @override
    def gradients(self, call: LayerCall, saved: tuple[torch.Tensor, ...], g: torch.Tensor, wanted: bool) -> Gradients:
        x, weight, mean, rstd = saved
        rows, channels = x.shape[:2]
        spatial, groups = math.prod(x.shape[2:]), mean.numel() // rows
        flat = (1, rows * channels, spatial)
        g = g.reshape(flat).contiguous()  # the kernel does not look at strides; a single row reshapes to a view
        gx, *by_row = torch.ops.aten.native_group_norm_backward(
            g, x.view(flat), mean, rstd, weight.repeat(rows),
            1, rows * channels, spatial, rows * groups, [wanted, True, True],
        )  # fmt: skip
        scale, shift = (per_sample(call, t.view(rows, channels)) for t in by_row)
        return gx.view(x.shape) if wanted else None, scale, shift


class LayerNorm(Norm):
    """``nn.LayerNorm``, with and without bias."""

    @override
    def forward(self, call: LayerCall, x: torch.Tensor) -> tuple[torch.Tensor, Saved]:
        """Normalise over the last dimensions, shape ``[..., *normalized]``."""
        module, (weight, bias) = call.module, precise_parameters(call)
        out, mean, rstd = torch.ops.aten.native_layer_norm(x, module.normalized_shape, weight, bias, module.eps)
        return out, (x, weight, bias, mean, rstd)

    @override
    def gradients(self, call: LayerCall, saved: tuple[torch.Tensor, ...], g: torch.Tensor, wanted: bool) -> Gradients:
        x, weight, bias, mean, rstd = saved
        shape, samples = call.module.normalized_shape, call.rows.samples
        kernel = torch.ops.aten.native_layer_norm_backward
        large = by_sample(x.device) and x.numel() // samples >= _LOOP_ABOVE
        if call.rows.plain and x.dim() > len(shape) and large:
            parts = zip(*(t.chunk(samples) for t in (g.contiguous(), x, mean, rstd)), strict=True)
            found = [kernel(*p[:2], shape, *p[2:], weight, bias, [wanted, True, True]) for p in parts]
            gx, scale, shift = zip(*found, strict=True)
            shift = scale if bias is None else shift
            return torch.cat(gx) if wanted else None, torch.stack(scale), torch.stack(shift)
        gx = kernel(g, x, shape, mean, rstd, weight, bias, [True, False, False])[0] if wanted else None
        return gx, *_scale_and_shift(call, (x - mean).mul_(rstd), g, len(shape))


class RMSNorm(Norm):
    """``nn.RMSNorm``."""

    @override
    def forward(self, call: LayerCall, x: torch.Tensor) -> tuple[torch.Tensor, Saved]:
        """Divide by the root of the mean square, shape ``[..., *normalized]``."""
        dims = tuple(range(-len(call.module.normalized_shape), 0))
        eps = torch.finfo(x.dtype).eps if call.module.eps is None else call.module.eps
        rstd = torch.rsqrt(x.square().mean(dims, keepdim=True) + eps)
        weight, _ = precise_parameters(call)
        assert weight is not None
        return (x * rstd).mul_(weight), (x, weight, rstd)

    @override
    def gradients(self, call: LayerCall, saved: tuple[torch.Tensor, ...], g: torch.Tensor, wanted: bool) -> Gradients:
        x, weight, rstd = saved
        dims = tuple(range(-weight.dim(), 0))
        normal, gx = x * rstd, None
        if wanted:
            scaled = g * weight
            gx = (scaled - normal * (scaled * normal).mean(dims, keepdim=True)) * rstd
        return gx, *_scale_and_shift(call, normal, g, weight.dim())


def _scale_and_shift(
    call: LayerCall, normal: torch.Tensor, g: torch.Tensor, features: int
) -> tuple[torch.Tensor, torch.Tensor]:
    shift = call.rows.matrices(g, features).sum(1) if call.trains("bias") else g
    return call.rows.matrices(normal.mul_(g), features).sum(1), shift


class FixedNorm(Norm):
    """``nn.BatchNorm1d`` to ``nn.BatchNorm3d`` in evaluation mode: an affine map of every channel."""

    @override
    def accepts(self, module: nn.Module) -> bool:
        """In evaluation mode, with running statistics; in training mode it mixes the samples."""
        return plainly(module, *self.kinds) and not module.training and module.running_mean is not None

    @override
    def forward(self, call: LayerCall, x: torch.Tensor) -> tuple[torch.Tensor, Saved]:
        """``(x - mean) / sqrt(var + eps) * weight + bias``, shape ``[rows, channels, ...]``."""
        module, (weight, bias) = call.module, precise_parameters(call)
        out = torch.nn.functional.batch_norm(
            x, module.running_mean, module.running_var, weight, bias, False, 0.0, module.eps
        )
        return out, (x, weight, module.running_mean, torch.rsqrt(module.running_var + module.eps))

    @override
    def gradients(self, call: LayerCall, saved: tuple[torch.Tensor, ...], g: torch.Tensor, wanted: bool) -> Gradients:
        x, weight, mean, rstd = saved
        channel = (1, -1, *[1] * (x.dim() - 2))
        normal = (x - mean.view(channel)) * rstd.view(channel)
        scale, shift = (
            per_sample(call, t.sum(tuple(range(2, t.dim()))) if t.dim() > 2 else t) for t in (normal.mul_(g), g)
        )
        return g * (weight * rstd).view(channel) if wanted else None, scale, shift


NORMS: tuple[Norm, ...] = (
    GroupNorm(nn.GroupNorm, _InstanceNorm),
    LayerNorm(nn.LayerNorm, features=1),
    RMSNorm(nn.RMSNorm, features=1),
    FixedNorm(_BatchNorm),
)
"""One entry per mechanism."""

"""Normalisation layers: the per-sample gradient of scale and shift is one number per feature."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from dpfix.engines.bookkeeping.calls import LayerCall, Rule
from dpfix.engines.bookkeeping.contributions import Kept, full_precision

_LOOP_ABOVE = 16384
"""Numbers per sample from which one kernel per sample is faster than a product over all of them."""

Saved = tuple[torch.Tensor | None, ...]


class _Norm(Rule):
    """What the normalisations share."""

    def prepare(self, module: Any, x: torch.Tensor) -> torch.Tensor:
        """Statistics are computed in single precision at least.

        Args:
            module: the layer.
            x: its input.

        Returns:
            The input in the precision of the statistics.
        """
        return full_precision(x)

    def finish(self, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Back to the input's precision, unless autocast keeps normalisations in single precision (CUDA).

        Args:
            x: the layer's input.
            output: the normalised input.

        Returns:
            The layer's output.
        """
        kept = x.is_cuda and torch.is_autocast_enabled("cuda")
        return output if kept or output.dtype == x.dtype else output.to(x.dtype)


def report(call: LayerCall, scale: torch.Tensor | None, shift: torch.Tensor | None) -> None:
    """Report the gradients of ``weight`` and ``bias``.

    Args:
        call: the call.
        scale: shape ``[samples, *weight]``.
        shift: the same for the bias.
    """
    for name, gradient in (("weight", scale), ("bias", shift)):
        p = call.parameter(name)
        if p is not None and gradient is not None:
            call.report(p, Kept(gradient.reshape(-1, *p.shape)))


class GroupNorm(_Norm):
    """``nn.GroupNorm``.

    Seen as one sample with ``samples * groups`` groups and its own weights for every sample, PyTorch's own kernel
    gives the per-sample gradients and the input gradient in one pass.
    """

    def accepts(self, module: nn.Module) -> bool:
        """Whether it normalises by the sample's own statistics.

        Args:
            module: a module.

        Returns:
            Whether it does.
        """
        return isinstance(module, nn.GroupNorm) and type(module).forward is nn.GroupNorm.forward

    def forward(self, call: LayerCall, x: torch.Tensor) -> tuple[torch.Tensor, Saved]:
        """Normalise over the groups.

        Args:
            call: the call.
            x: shape ``[rows, channels, *spatial]``.

        Returns:
            The same shape; input, weight, mean and reciprocal deviation are kept.
        """
        module: Any = call.module
        rows, channels = x.shape[:2]
        groups, x = module.num_groups, x.contiguous()
        out, mean, rstd = torch.ops.aten.native_group_norm(
            x, module.weight, module.bias, rows, channels, math.prod(x.shape[2:]), groups, module.eps
        )
        return out, (x, module.weight, mean, rstd)

    def backward(
        self, call: LayerCall, saved: tuple[torch.Tensor, ...], g: torch.Tensor, wanted: bool
    ) -> torch.Tensor | None:
        """See :class:`Rule`.

        Args:
            call: the call.
            saved: what :meth:`forward` kept.
            g: gradient of the output.
            wanted: whether the input's gradient is needed.

        Returns:
            The gradient of the input.
        """
        x, weight, mean, rstd = saved
        rows, channels = x.shape[:2]
        spatial, groups = math.prod(x.shape[2:]), mean.numel() // rows
        flat = (1, rows * channels, spatial)
        gx, scale, shift = torch.ops.aten.native_group_norm_backward(
            g.reshape(flat), x.view(flat), mean.view(1, -1), rstd.view(1, -1), weight.repeat(rows),
            1, rows * channels, spatial, rows * groups, [wanted, True, True],
        )  # fmt: skip
        per_row = [t.view(rows, channels) for t in (scale, shift)]
        report(call, *(call.rows.adjacent(t).view(call.rows.samples, -1, channels).sum(1) for t in per_row))
        return gx.view(x.shape) if wanted else None


class InstanceNorm(_Norm):
    """``nn.InstanceNorm1d`` to ``nn.InstanceNorm3d``: as in PyTorch, a BatchNorm of one sample with more channels."""

    def accepts(self, module: nn.Module) -> bool:
        """Whether it normalises by the sample's own statistics.

        Args:
            module: a module.

        Returns:
            Whether it does.
        """
        own = isinstance(module, _InstanceNorm) and type(module).forward is _InstanceNorm.forward
        return own and not module.track_running_stats

    def prepare(self, module: Any, x: torch.Tensor) -> torch.Tensor:
        """As every normalisation; there must be a batch.

        Args:
            module: the layer.
            x: its input.

        Returns:
            The input in the precision of the statistics.

        Raises:
            NotImplementedError: there is none.
        """
        if x.dim() == module._get_no_batch_dim():
            raise NotImplementedError("an instance normalisation was called without a batch")
        return full_precision(x)

    def forward(self, call: LayerCall, x: torch.Tensor) -> tuple[torch.Tensor, Saved]:
        """Normalise every channel of every row.

        Args:
            call: the call.
            x: shape ``[rows, channels, *spatial]``.

        Returns:
            The same shape; input, weight, mean and reciprocal deviation are kept.
        """
        module: Any = call.module
        x = x.contiguous()
        weight, bias = (t if t is None else t.repeat(len(x)) for t in (module.weight, module.bias))
        out, mean, rstd = torch.ops.aten.native_batch_norm(
            x.view(1, -1, *x.shape[2:]), weight, bias, None, None, True, 0.0, module.eps
        )
        return torch.ops.aten._unsafe_view(out, x.shape), (x, module.weight, mean, rstd)

    def backward(
        self, call: LayerCall, saved: tuple[torch.Tensor, ...], g: torch.Tensor, wanted: bool
    ) -> torch.Tensor | None:
        """See :class:`Rule`.

        Args:
            call: the call.
            saved: what :meth:`forward` kept.
            g: gradient of the output.
            wanted: whether the input's gradient is needed.

        Returns:
            The gradient of the input.
        """
        x, weight, mean, rstd = saved
        flat, channels = (1, -1, *x.shape[2:]), x.shape[1]
        gx, scale, shift = torch.ops.aten.native_batch_norm_backward(
            g.reshape(flat), x.view(flat), weight.repeat(len(x)), None, None, mean, rstd,
            True, call.module.eps, [wanted, True, True],
        )  # fmt: skip
        per_row = [t.view(-1, channels) for t in (scale, shift)]
        report(call, *(call.rows.adjacent(t).view(call.rows.samples, -1, channels).sum(1) for t in per_row))
        return gx.view(x.shape) if wanted else None


class LayerNorm(_Norm):
    """``nn.LayerNorm``, with and without weight and bias."""

    features = 1

    def accepts(self, module: nn.Module) -> bool:
        """Whether it is a LayerNorm with PyTorch's own forward.

        Args:
            module: a module.

        Returns:
            Whether it is.
        """
        return isinstance(module, nn.LayerNorm) and type(module).forward is nn.LayerNorm.forward

    def forward(self, call: LayerCall, x: torch.Tensor) -> tuple[torch.Tensor, Saved]:
        """Normalise over the last dimensions.

        Args:
            call: the call.
            x: shape ``[..., *normalized]``.

        Returns:
            The same shape; input, weight, mean and reciprocal deviation are kept.
        """
        module: Any = call.module
        out, mean, rstd = torch.ops.aten.native_layer_norm(
            x, module.normalized_shape, module.weight, module.bias, module.eps
        )
        return out, (x, module.weight, module.bias, mean, rstd)

    def backward(
        self, call: LayerCall, saved: tuple[torch.Tensor, ...], g: torch.Tensor, wanted: bool
    ) -> torch.Tensor | None:
        """See :class:`Rule`.

        Args:
            call: the call.
            saved: what :meth:`forward` kept.
            g: gradient of the output.
            wanted: whether the input's gradient is needed.

        Returns:
            The gradient of the input.
        """
        x, weight, bias, mean, rstd = saved
        shape = call.module.normalized_shape
        features = len(shape)  # type: ignore[arg-type]
        kernel = torch.ops.aten.native_layer_norm_backward
        simple = call.rows.dim == 0 and not call.rows.interleaved and call.rows.samples > 0
        if simple and x.dim() > features and x.numel() // call.rows.samples >= _LOOP_ABOVE:
            parts = [t.chunk(call.rows.samples) for t in (g.contiguous(), x, mean, rstd)]
            found = [
                kernel(*p[:2], shape, *p[2:], weight, bias, [wanted, True, True]) for p in zip(*parts, strict=True)
            ]
            report(call, torch.stack([f[1] for f in found]), torch.stack([f[2] for f in found]))
            return torch.cat([f[0] for f in found]) if wanted else None
        scaled = (x - mean).mul_(rstd).mul_(g)
        report(call, call.rows.matrices(scaled, features).sum(1), call.rows.matrices(g, features).sum(1))
        return kernel(g, x, shape, mean, rstd, weight, bias, [True, False, False])[0] if wanted else None


class RMSNorm(_Norm):
    """``nn.RMSNorm``."""

    features = 1

    def accepts(self, module: nn.Module) -> bool:
        """Whether it is an RMSNorm with PyTorch's own forward.

        Args:
            module: a module.

        Returns:
            Whether it is.
        """
        return isinstance(module, nn.RMSNorm) and type(module).forward is nn.RMSNorm.forward

    def forward(self, call: LayerCall, x: torch.Tensor) -> tuple[torch.Tensor, Saved]:
        """Divide by the root of the mean square.

        Args:
            call: the call.
            x: shape ``[..., *normalized]``.

        Returns:
            The same shape; input, weight and reciprocal root are kept.
        """
        module: Any = call.module
        dims = tuple(range(-len(module.normalized_shape), 0))
        eps = torch.finfo(x.dtype).eps if module.eps is None else module.eps
        rstd = torch.rsqrt(x.square().mean(dims, keepdim=True) + eps)
        return (x * rstd).mul_(module.weight), (x, module.weight, rstd)

    def backward(
        self, call: LayerCall, saved: tuple[torch.Tensor, ...], g: torch.Tensor, wanted: bool
    ) -> torch.Tensor | None:
        """See :class:`Rule`.

        Args:
            call: the call.
            saved: what :meth:`forward` kept.
            g: gradient of the output.
            wanted: whether the input's gradient is needed.

        Returns:
            The gradient of the input.
        """
        x, weight, rstd = saved
        dims = tuple(range(-weight.dim(), 0))
        normal = x * rstd
        report(call, call.rows.matrices(normal * g, weight.dim()).sum(1), None)
        if not wanted:
            return None
        scaled = g * weight
        return (scaled - normal * (scaled * normal).mean(dims, keepdim=True)) * rstd


class FixedNorm(_Norm):
    """``nn.BatchNorm1d`` to ``nn.BatchNorm3d`` in evaluation mode: an affine map of every channel."""

    def accepts(self, module: nn.Module) -> bool:
        """Whether it is a BatchNorm that uses its running statistics.

        Args:
            module: a module.

        Returns:
            Whether it is.
        """
        own = isinstance(module, _BatchNorm) and type(module).forward is _BatchNorm.forward
        return own and not module.training and module.running_mean is not None

    def forward(self, call: LayerCall, x: torch.Tensor) -> tuple[torch.Tensor, Saved]:
        """``(x - mean) / sqrt(var + eps) * weight + bias``.

        Args:
            call: the call.
            x: shape ``[rows, channels, ...]``.

        Returns:
            The same shape; the input and the statistics are kept.
        """
        module: Any = call.module
        rstd = torch.rsqrt(module.running_var + module.eps)
        out = torch.nn.functional.batch_norm(
            x, module.running_mean, module.running_var, module.weight, module.bias, False, 0.0, module.eps
        )
        return out, (x, module.weight, module.running_mean, rstd)

    def backward(
        self, call: LayerCall, saved: tuple[torch.Tensor, ...], g: torch.Tensor, wanted: bool
    ) -> torch.Tensor | None:
        """See :class:`Rule`.

        Args:
            call: the call.
            saved: what :meth:`forward` kept.
            g: gradient of the output.
            wanted: whether the input's gradient is needed.

        Returns:
            The gradient of the input.
        """
        x, weight, mean, rstd = saved
        channel = (1, -1, *[1] * (x.dim() - 2))
        normal = (x - mean.view(channel)) * rstd.view(channel)
        sums = (call.rows.adjacent(t).flatten(2 if x.dim() > 2 else 1) for t in (normal * g, g))
        per_row = (t.sum(2) if x.dim() > 2 else t for t in sums)
        report(call, *(t.view(call.rows.samples, -1, t.shape[1]).sum(1) for t in per_row))
        return g * (weight * rstd).view(channel) if wanted else None

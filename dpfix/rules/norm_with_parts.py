"""A normalisation that ends in parts of its own: timm's ``BatchNormAct2d`` has its dropout and its activation inside."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import override

from dpfix.errors import USER_CODE_ERRORS
from dpfix.instrument.rng import rng_untouched

_SPATIAL = {nn.BatchNorm1d: 1, nn.BatchNorm3d: 3}


def ends_in_its_parts(module: Any) -> bool:
    """Whether a subclass of BatchNorm computes batch normalisation and then its children, one after another.

    It is tried on random numbers, in training and in evaluation mode, with weights and statistics of all kinds.

    Args:
        module: has a ``forward`` of its own.

    Returns:
        Whether the results are equal; not if it has no children.
    """
    if not any(True for _ in module.children()):
        return False
    spatial = next((n for kind, n in _SPATIAL.items() if isinstance(module, kind)), 2)
    with rng_untouched(), torch.no_grad():
        tried = copy.deepcopy(module).cpu().double()
        for t in (*tried.parameters(recurse=False), *tried.buffers(recurse=False)):
            if t.is_floating_point():
                t.uniform_(0.5, 1.5)
        x = torch.randn(3, module.num_features, *[4] * spatial, dtype=torch.float64)
        try:
            return all(_same(tried.train(training), x) for training in (True, False))
        except USER_CODE_ERRORS:
            return False


def _same(module: _BatchNorm, x: torch.Tensor) -> bool:
    for child in module.children():
        child.eval()
    fixed = not module.training and module.running_mean is not None
    statistics = (module.running_mean, module.running_var) if fixed else (None, None)
    wanted = F.batch_norm(x, *statistics, module.weight, module.bias, not fixed, 0.0, module.eps)
    for child in module.children():
        wanted = child(wanted)
    return torch.allclose(module(x.clone()), wanted)


class _WithParts(nn.Module):
    """Normalises, and then calls its children, one after another."""

    @override
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        x = super().forward(input)
        for child in self.children():
            x = child(x)
        return x


class GroupNormWithParts(_WithParts, nn.GroupNorm):
    """Group normalisation and what follows it."""


class InstanceNorm1dWithParts(_WithParts, nn.InstanceNorm1d):
    """Instance normalisation and what follows it."""


class InstanceNorm2dWithParts(_WithParts, nn.InstanceNorm2d):
    """Instance normalisation and what follows it."""


class InstanceNorm3dWithParts(_WithParts, nn.InstanceNorm3d):
    """Instance normalisation and what follows it."""


WITH_PARTS = {cls.__mro__[2]: cls for cls in _WithParts.__subclasses__()}


def with_parts_of(new: nn.Module, old: nn.Module) -> nn.Module:
    """The normalisation that takes the place of another one, with the other's parts behind it.

    Args:
        new: a plain normalisation.
        old: the layer that it replaces.

    Returns:
        The same object; parameters and parts have the names that they had.
    """
    if any(True for _ in old.children()):
        new.__class__ = WITH_PARTS[type(new)]
        for name, child in old.named_children():
            new.add_module(name, child)
    return new

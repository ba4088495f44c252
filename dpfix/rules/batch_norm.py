from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from typing_extensions import override

from dpfix.report.finding import Finding, Fixability, Severity
from dpfix.rules.norm_with_parts import ends_in_its_parts, with_parts_of
from dpfix.rules.rule import Rule
from dpfix.scan.scan import Scan

_MAX_GROUPS = 32
_KNOWN_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)


class BatchNorm(Rule):
    """BatchNorm in training mode normalises a sample with the statistics of the others.

    What: any subclass of ``torch.nn``'s batch normalisation that would use the statistics of the batch: in training
    mode, or in evaluation mode without running statistics; with or without affine parameters, trainable or frozen.

    Why bad: sample i's output, and so its gradient, depends on sample j. Clipping per sample bounds nothing, and the
    running statistics leave the training without noise (measured with Opacus 1.6.0: 3.1 times the clip norm).

    Example: ``nn.BatchNorm2d(64)``, ``nn.BatchNorm1d(64, affine=False)``, ``nn.SyncBatchNorm(64)``.

    Use instead: group normalisation (Wu and He 2018, https://arxiv.org/abs/1803.08494), instance or layer normalisation;
    ``norm=`` of the call chooses. A BatchNorm in ``eval()`` with running statistics is a fixed affine map and stays.
    """

    title = "BatchNorm mixes the samples of a batch"
    severity = Severity.BREAKS_GUARANTEE
    outcomes = {
        Fixability.CHANGES_MODEL: "weight, bias, eps, device, dtype and ``requires_grad`` are kept by reusing the very "
        "parameters; running statistics are dropped. The number of groups never leaves one element per group: at least two "
        "channels per group, and eight for BatchNorm1d, which may see no spatial positions at all.",
        Fixability.REFUSED: "the root itself, and a subclass with a ``forward`` of its own, unless that is seen to compute "
        "batch normalisation and then the layer's own children, as in timm, which are kept.",
        Fixability.NOTHING: "in ``eval()`` with running statistics; a step in training mode is refused.",
    }

    @override
    def find(self, scan: Scan) -> Iterator[Finding]:
        for path, module in scan.modules(_BatchNorm):
            if _lazy(module):
                continue  # looked at again once its parameters exist
            if not is_batch_coupled(module):
                yield self.finding(
                    Fixability.NOTHING,
                    f"{scan.place(path)} is in eval() and normalises with fixed statistics.",
                    "a fixed affine map per channel mixes no samples; it has to stay in eval() while training.",
                    fix="kept as it is; a step with this layer in training mode is refused",
                    path=path,
                )
                continue
            fact = f"{scan.place(path)} mixes the samples of a batch."
            why = "sample i's output depends on sample j, so clipping per sample bounds nothing."
            if not path or not (type(module).forward in _KNOWN_FORWARDS or ends_in_its_parts(module)):
                yield self.refusal(fact, why, _way_out(module, path), path)
                continue
            yield self.finding(
                Fixability.CHANGES_MODEL,
                fact,
                why,
                fix=f"{_describe(module, scan.privacy.norm)}; weight, bias, eps, dtype and requires_grad kept, "
                "running statistics dropped",
                help="norm='instance' or 'layer' chooses another replacement; or keep the statistics fixed: "
                "module.eval() and requires_grad_(False) on this layer.",
                path=path,
            )

    @override
    def fix(self, module: nn.Module, scan: Scan) -> nn.Module:
        assert isinstance(module, _BatchNorm)
        return with_parts_of(_replacement(module, scan.privacy.norm), module)

    VALID = (
        lambda: _model(nn.GroupNorm(4, 8)),
        lambda: _model(nn.BatchNorm2d(8).eval()),
        lambda: _model(nn.InstanceNorm2d(8)),
    )
    INVALID = (
        lambda: _model(nn.BatchNorm2d(8)),
        lambda: _model(nn.BatchNorm2d(8, affine=False)),
        lambda: _model(nn.BatchNorm2d(8).requires_grad_(False)),
        lambda: _model(nn.BatchNorm2d(8, track_running_stats=False).eval()),
        lambda: _model(_Activated(8)),
        lambda: _model(_WithActivation(8)),
    )


def is_batch_coupled(module: nn.Module) -> bool:
    """Whether a module normalises with statistics of the batch.

    Args:
        module: any module.

    Returns:
        True for a BatchNorm that would use batch statistics in its present mode.
    """
    return isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)


def _lazy(module: nn.Module) -> bool:
    state = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return any(isinstance(t, (UninitializedParameter, UninitializedBuffer)) for t in state)


def group_count(channels: int, smallest: int) -> int:
    """The largest number of groups with enough channels in each.

    Args:
        channels: number of channels.
        smallest: least number of channels in a group.

    Returns:
        A divisor of ``channels``, at most 32; 1 if there is no better one.

    >>> group_count(64, 2), group_count(8, 2), group_count(16, 8), group_count(7, 2)
    (32, 4, 2, 1)
    """
    return max(g for g in range(1, _MAX_GROUPS + 1) if channels % g == 0 and (channels // g >= smallest or g == 1))


def _smallest_group(module: _BatchNorm) -> int:
    return 8 if isinstance(module, nn.BatchNorm1d) else 2


def _replacement(module: _BatchNorm, norm: str) -> nn.Module:
    channels = module.num_features
    if norm == "instance":
        kinds = {nn.BatchNorm1d: nn.InstanceNorm1d, nn.BatchNorm3d: nn.InstanceNorm3d}
        kind = next((new for old, new in kinds.items() if isinstance(module, old)), nn.InstanceNorm2d)
        new: nn.Module = kind(channels, eps=module.eps, affine=False)
        new.affine = module.affine  # type: ignore[assignment]
    else:
        groups = 1 if norm == "layer" else group_count(channels, _smallest_group(module))
        new = nn.GroupNorm(groups, channels, eps=module.eps, affine=False)
        new.affine = module.affine  # type: ignore[assignment]
    # The parameters themselves are handed over, so the optimizer, its state and its schedulers go on.
    new.weight, new.bias = module.weight, module.bias  # type: ignore[assignment]
    return new


def _describe(module: nn.Module, norm: str) -> str:
    assert isinstance(module, _BatchNorm)
    if norm == "instance":
        return f"InstanceNorm({module.num_features})"
    groups = 1 if norm == "layer" else group_count(module.num_features, _smallest_group(module))
    return f"GroupNorm({groups}, {module.num_features})"


def _way_out(module: nn.Module, path: str) -> str:
    if not path:
        return "the root itself cannot be replaced; wrap it: torch.nn.Sequential(module)."
    return (
        f"{type(module).__name__} has a forward of its own, so dpfix does not guess what it computes. Replace it "
        "by torch.nn.GroupNorm yourself, or freeze it: eval() and requires_grad_(False)."
    )


def _model(norm: nn.Module) -> dict[str, Any]:
    return {"module": nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))}


class _WithActivation(nn.BatchNorm2d):
    """As in timm."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.SiLU()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.act(self.drop(super().forward(input)))


class _Activated(nn.BatchNorm2d):
    """A BatchNorm with its activation inside, which is no part of it."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.relu(super().forward(input))

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from typing_extensions import override

from dpfix.instrument.batch_norm_calls import PerSampleNorm, describe, groups_of, per_sample_class
from dpfix.instrument.source import line_of_code
from dpfix.report.finding import Finding, Fixability, Severity
from dpfix.rules.rule import Rule
from dpfix.scan.scan import Scan
from dpfix.weights.folded import can_fold, fold, shares_weights

_KNOWN_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)
_WHY = "sample i's output depends on sample j, so clipping per sample bounds nothing."
_CHOICE = "norm='instance' or 'layer' chooses another replacement, norm='folded' one that keeps pretrained statistics"


class BatchNorm(Rule):
    """BatchNorm in training mode normalises a sample with the statistics of the others.

    What: any subclass of ``torch.nn``'s batch normalisation that would use the statistics of the batch: in training
    mode, or in evaluation mode without running statistics; with or without affine parameters, trainable or frozen. And any
    other module whose ``forward`` calls ``torch.nn.functional.batch_norm`` so that it mixes the samples; a run of the
    training step shows these. A call with one row mixes none (a standardised weight, a sample normalised by itself) and
    stays.

    Why bad: sample i's output, and so its gradient, depends on sample j. Clipping per sample bounds nothing, and the
    running statistics leave the training without noise (measured with Opacus 1.6.0: 3.1 times the clip norm).

    Example: ``nn.BatchNorm2d(64)``, ``nn.BatchNorm1d(64, affine=False)``, ``nn.SyncBatchNorm(64)``, timm's
    ``BatchNormAct2d(64)``.

    Use instead: group normalisation (Wu and He 2018, https://arxiv.org/abs/1803.08494), instance or layer normalisation;
    ``norm=`` of the call chooses. For a pretrained model ``norm="folded"`` carries the running statistics over: groups of at
    least sixteen channels, whose mean and standard deviation follow from the statistics on average, so that weight and bias
    can make up for them without reading any data. What the statistics were made of is released with them: they must come
    from pretraining, and not from a pass over the private data. A BatchNorm in ``eval()`` with running statistics is a
    fixed affine map and stays.

    A plain BatchNorm is replaced. A subclass with a ``forward`` of its own (an activation, dropout inside), any other
    module, and the root stay what they are: class, parameters, and all else that ``forward`` does; only ``batch_norm`` in
    it is computed as the replacement would, in training and in ``eval()``. Statistics that such a call would have tracked
    leave the state dict, so that it does not load into the original model, which computes something else. A copy or a
    pickle keeps the repair. In a block that is re-parametrised for inference (RepVGG) the branches train with the
    replacement, which depends on the sample and cannot be folded into a convolution: leave such a model as it was trained.
    Reading ``running_mean`` of a repaired layer is an ``AttributeError`` that says so.
    A subclass that computes statistics by hand is not repaired; the audit refuses it (DPF013).
    """

    title = "BatchNorm mixes the samples of a batch"
    severity = Severity.BREAKS_GUARANTEE
    outcomes = {
        Fixability.CHANGES_MODEL: "weight, bias, eps, device, dtype and ``requires_grad`` are kept by reusing the very "
        "parameters; running statistics are dropped. The number of groups never leaves one element per group: at least two "
        "channels per group, and eight for BatchNorm1d, which may see no spatial positions at all.",
        Fixability.NOTHING: "in ``eval()`` with running statistics; a step in training mode is refused.",
    }

    @override
    def find(self, scan: Scan) -> Iterator[Finding]:
        for path, module in scan.modules(_BatchNorm):
            if _lazy(module) or isinstance(module, PerSampleNorm):
                continue  # a lazy one is looked at again once its parameters exist
            if not is_batch_coupled(module):
                yield self.finding(
                    Fixability.NOTHING,
                    f"{scan.place(path)} is in eval() and normalises with fixed statistics.",
                    "a fixed affine map per channel mixes no samples; it has to stay in eval() while training.",
                    fix="kept as it is; a step with this layer in training mode is refused",
                    path=path,
                )
                continue
            place, new = scan.place(path), _describe(module, scan.privacy.norm)
            own = "" if _replaceable(module, path) else f" by batch_norm in its forward ({_line(module)})"
            yield self.finding(
                Fixability.CHANGES_MODEL,
                f"{place} mixes the samples of a batch{own}.",
                _WHY,
                fix=f"{new}{own and ' in place of batch_norm, the rest of the layer as it is'}; {_kept(module, scan, own)}",
                help=f"{_CHOICE}; or keep the statistics fixed: module.eval() and requires_grad_(False) on this layer.",
                path=path,
            )
        for path, seen in scan.mixing.items():
            module = scan.module.get_submodule(path)
            if isinstance(module, PerSampleNorm) and seen.sites <= module.sites:
                continue
            yield self.finding(
                Fixability.CHANGES_MODEL,
                f"{scan.place(path)} mixes the samples of a batch by batch_norm in its forward ({', '.join(seen.lines)}).",
                _WHY,
                fix=f"{describe(scan.privacy.norm, seen.channels, seen.groups)} in place of batch_norm; weight, bias and eps "
                "kept, running statistics not used",
                help=f"{_CHOICE}; or normalise with fixed statistics: training=False.",
                path=path,
            )

    @override
    def fix(self, module: nn.Module, scan: Scan) -> nn.Module | Mapping[str, Any]:
        path = scan.aliases[module][0]
        if isinstance(module, _BatchNorm) and _folds(module, scan):
            fold(module, _groups(module, scan.privacy.norm))
        if _replaceable(module, path):
            return _replacement(module, scan.privacy.norm)
        sites = scan.mixing[path].sites if path in scan.mixing else frozenset()
        return {"__class__": per_sample_class(type(module), scan.privacy.norm, sites)}

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
    )


def is_batch_coupled(module: nn.Module) -> bool:
    """Whether a module normalises with statistics of the batch.

    Args:
        module: any module.

    Returns:
        True for a BatchNorm that would use batch statistics in its present mode.
    """
    return isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)


def _replaceable(module: nn.Module, path: str) -> TypeGuard[_BatchNorm]:
    """Whether another layer can take the place of a whole module: all that it does is known, and so is its owner."""
    return bool(path) and isinstance(module, _BatchNorm) and type(module).forward in _KNOWN_FORWARDS


def _folds(module: _BatchNorm, scan: Scan) -> bool:
    """Whether the statistics of a layer go into weight and bias."""
    if scan.privacy.norm != "folded" or not can_fold(module):
        return False
    return not shares_weights(module, [m for _, m in scan.modules(_BatchNorm) if isinstance(m, _BatchNorm)])


def _kept(module: nn.Module, scan: Scan, own: str) -> str:
    """What becomes of parameters and statistics of a layer."""
    assert isinstance(module, _BatchNorm)
    if _folds(module, scan):
        return (
            "eps, dtype and requires_grad kept, running statistics folded into weight and bias. No data was read; the statistics "
            "are released with the weights, so that they must not come from the private data"
        )
    not_folded = (
        "" if scan.privacy.norm != "folded" else ", not folded: weight, bias and statistics of its own are needed"
    )
    dropped = "not used" if own else "dropped"
    return f"weight, bias, eps, dtype and requires_grad kept, running statistics {dropped}{not_folded}"


def _line(module: nn.Module) -> str:
    return line_of_code(type(module).forward)


def _lazy(module: nn.Module) -> bool:
    state = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return any(isinstance(t, (UninitializedParameter, UninitializedBuffer)) for t in state)


def fixed_norms(scan: Scan) -> tuple[str, ...]:
    """Paths of the BatchNorm layers that normalise with fixed statistics and have to go on doing so."""
    return tuple(path for path, module in scan.modules(_BatchNorm) if not isinstance(module, PerSampleNorm))


def _replacement(module: _BatchNorm, norm: str) -> nn.Module:
    channels = module.num_features
    if norm == "instance":
        kinds = {nn.BatchNorm1d: nn.InstanceNorm1d, nn.BatchNorm3d: nn.InstanceNorm3d}
        kind = next((new for old, new in kinds.items() if isinstance(module, old)), nn.InstanceNorm2d)
        new: nn.Module = kind(channels, eps=module.eps, affine=False)
        new.affine = module.affine  # type: ignore[assignment]
    else:
        new = nn.GroupNorm(_groups(module, norm), channels, eps=module.eps, affine=False)
        new.affine = module.affine  # type: ignore[assignment]
    # The parameters themselves are handed over, so the optimizer, its state and its schedulers go on.
    new.weight, new.bias = module.weight, module.bias  # type: ignore[assignment]
    return new


def _groups(module: _BatchNorm, norm: str) -> int:
    return groups_of(norm, module.num_features, not isinstance(module, nn.BatchNorm1d))


def _describe(module: nn.Module, norm: str) -> str:
    assert isinstance(module, _BatchNorm)
    return describe(norm, module.num_features, _groups(module, norm))


def _model(norm: nn.Module) -> dict[str, Any]:
    return {"module": nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))}


class _Activated(nn.BatchNorm2d):
    """A BatchNorm with its activation inside, as in timm."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.relu(super().forward(input))

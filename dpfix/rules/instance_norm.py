"""InstanceNorm with running statistics collects them over the batch.

What: ``nn.InstanceNorm*d(track_running_stats=True)`` in training mode.

Why bad: the output in training mode is per sample, but the running mean and variance are averaged over the samples
and leave the training without noise.

Example: ``nn.InstanceNorm3d(32, affine=True, track_running_stats=True)``.

Use instead: ``track_running_stats=False`` (the default).

Fix safety: changes the model in evaluation mode, where the layer then normalises with the sample's own statistics; in
training mode it computes the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.instancenorm import _InstanceNorm

from dpfix.errors import ModelError
from dpfix.report.finding import Finding, Fixability, Severity

if TYPE_CHECKING:
    from dpfix.scan.scan import Scan

CODE = "DPF002"
TITLE = "InstanceNorm keeps running statistics of the batch"
ERROR = ModelError


def find(scan: Scan) -> Iterator[Finding]:
    """Every InstanceNorm that would update running statistics.

    Args:
        scan: the objects of the call.

    Yields:
        One finding per module.
    """
    for path, module in scan.modules(_InstanceNorm):
        if not (module.track_running_stats and module.training):
            continue
        yield Finding(
            code=CODE,
            severity=Severity.BREAKS_GUARANTEE,
            fixability=Fixability.CHANGES_MODEL,
            fact=f"{scan.place(path)} keeps running statistics of the batch.",
            why="the running mean and variance depend on every sample and leave without noise.",
            fix="running statistics dropped; training-mode output unchanged, evaluation uses the sample's own",
            help="build the layer with track_running_stats=False.",
            path=path,
        )


def fix(module: nn.Module, scan: Scan) -> dict[str, Any]:
    """The attributes that turn the statistics off.

    Args:
        module: an InstanceNorm.
        scan: the objects of the call; not needed.

    Returns:
        Attribute values; the buffers become ``None``.
    """
    return {
        "track_running_stats": False,
        "running_mean": None,
        "running_var": None,
        "num_batches_tracked": None,
    }


def _model(**options: bool) -> dict[str, Any]:
    return {
        "module": nn.Sequential(nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, **options), nn.Flatten(), nn.LazyLinear(3))
    }


VALID = (lambda: _model(), lambda: _model(affine=True))
INVALID = (lambda: _model(track_running_stats=True), lambda: _model(affine=True, track_running_stats=True))

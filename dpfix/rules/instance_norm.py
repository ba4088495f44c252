from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from torch.nn.modules.instancenorm import _InstanceNorm
from typing_extensions import override

from dpfix.report.finding import Finding, Fixability, Severity
from dpfix.rules.rule import Rule
from dpfix.scan.scan import Scan


class InstanceNorm(Rule):
    """InstanceNorm with running statistics collects them over the batch.

    What: ``nn.InstanceNorm*d(track_running_stats=True)`` in training mode.

    Why bad: the output in training mode is per sample, but the running mean and variance are averaged over the samples
    and leave the training without noise.

    Example: ``nn.InstanceNorm3d(32, affine=True, track_running_stats=True)``.

    Use instead: ``track_running_stats=False`` (the default).
    """

    title = "InstanceNorm keeps running statistics of the batch"
    severity = Severity.BREAKS_GUARANTEE
    outcomes = {
        Fixability.CHANGES_MODEL: "in evaluation mode, where the layer then normalises with the sample's own statistics; "
        "in training mode it computes the same."
    }

    @override
    def find(self, scan: Scan) -> Iterator[Finding]:
        for path, module in scan.modules(_InstanceNorm):
            if module.track_running_stats and module.training:
                yield self.finding(
                    Fixability.CHANGES_MODEL,
                    f"{scan.place(path)} keeps running statistics of the batch.",
                    "the running mean and variance depend on every sample and leave without noise.",
                    fix="running statistics dropped; training-mode output unchanged, evaluation uses the sample's own",
                    help="build the layer with track_running_stats=False.",
                    path=path,
                )

    @override
    def fix(self, module: nn.Module, scan: Scan) -> Mapping[str, Any]:
        buffers = dict.fromkeys(("running_mean", "running_var", "num_batches_tracked"))
        return {"track_running_stats": False, **buffers}

    VALID = (lambda: _model(), lambda: _model(affine=True))
    INVALID = (lambda: _model(track_running_stats=True), lambda: _model(affine=True, track_running_stats=True))


def _model(**options: bool) -> dict[str, Any]:
    return {
        "module": nn.Sequential(nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, **options), nn.Flatten(), nn.LazyLinear(3))
    }

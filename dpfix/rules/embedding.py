"""Embedding options that write weights without noise, or give gradients that cannot be clipped per sample.

What: ``max_norm`` (forward rescales the rows that are used), ``sparse=True`` (sparse gradients) and
``scale_grad_by_freq=True`` (a row's gradient is divided by its count in the batch) of Embedding and EmbeddingBag.

Why bad: ``max_norm`` changes exactly the rows of the words a sample holds, without noise; the count in the batch
couples the samples; DP gradients are dense, so a sparse optimizer cannot use them.

Example: ``nn.Embedding(1000, 64, max_norm=1.0)``.

Use instead: the plain layer with a dense optimizer; a norm can be limited in forward by a differentiable expression.

Fix safety: not fixed; refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from dpfix.errors import ModelError
from dpfix.report.finding import Finding, Fixability, Severity

if TYPE_CHECKING:
    from dpfix.scan.scan import Scan

CODE = "DPF008"
TITLE = "an embedding option that breaks per-sample gradients"
ERROR = ModelError

_OPTIONS = {
    "max_norm": "forward rescales the rows of the words in the batch, without noise",
    "sparse": "the noisy sum is dense, and sparse gradients cannot be clipped per sample",
    "scale_grad_by_freq": "a row's gradient is divided by its count in the batch, which couples the samples",
}


def find(scan: Scan) -> Iterator[Finding]:
    """Every embedding with one of the options set.

    Args:
        scan: the objects of the call.

    Yields:
        One finding per module and option, refused.
    """
    for path, module in scan.modules(nn.Embedding, nn.EmbeddingBag):
        trainable = any(p.requires_grad for p in module.parameters())
        for option, why in _OPTIONS.items():
            value = getattr(module, option)
            if value in (None, False) or not (trainable or option == "max_norm"):
                continue
            yield Finding(
                code=CODE,
                severity=Severity.BREAKS_GUARANTEE,
                fixability=Fixability.REFUSED,
                fact=f"{scan.place(path)} has {option}={value}.",
                why=f"{why}.",
                help=f"build the layer without {option}"
                + (" and use a dense optimizer." if option == "sparse" else "."),
                path=path,
            )


def _model(**options: Any) -> dict[str, Any]:
    return {
        "module": nn.Sequential(nn.Embedding(11, 6, **options), nn.Flatten(), nn.LazyLinear(3)),
        "integers": 11,
    }


VALID = (lambda: _model(), lambda: _model(padding_idx=0))
INVALID = (lambda: _model(max_norm=1.0), lambda: _model(sparse=True), lambda: _model(scale_grad_by_freq=True))

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from typing_extensions import override

from dpfix.report.finding import Finding, Severity
from dpfix.rules.rule import Rule
from dpfix.scan.scan import Scan

_OPTIONS = {
    "max_norm": ("forward rescales the rows of the words in the batch, without noise", ""),
    "sparse": (
        "the noisy sum is dense, and sparse gradients cannot be clipped per sample",
        " and use a dense optimizer",
    ),
    "scale_grad_by_freq": (
        "a row's gradient is divided by its count in the batch, which couples the samples; counts of one sample alone would "
        "train another model",
        "; Adam evens out rare and frequent words from the noisy gradient",
    ),
}
"""Options by name, each with why it is refused and what else to do than to leave it out."""


class EmbeddingOptions(Rule):
    """Embedding options that write weights without noise, or give gradients that cannot be clipped per sample.

    What: ``max_norm`` (forward rescales the rows that are used), ``sparse=True`` (sparse gradients) and
    ``scale_grad_by_freq=True`` (a row's gradient is divided by its count in the batch) of Embedding and EmbeddingBag.

    Why bad: ``max_norm`` changes exactly the rows of the words a sample holds, without noise; the count in the batch
    couples the samples; DP gradients are dense, so a sparse optimizer cannot use them.

    Example: ``nn.Embedding(1000, 64, max_norm=1.0)``.

    ``scale_grad_by_freq`` has no per-sample meaning that is another layer: divided by its counts within one sample, the
    gradient is that of a model which sees words that a sample repeats once; but torch's counts are those of the batch, and
    training would silently become another one. Where rare words are to learn faster, an adaptive optimizer (Adam) does that
    from the noisy gradient, or a loss weight per word does it per sample.

    Use instead: the plain layer with a dense optimizer; a norm can be limited in forward by a differentiable expression.
    """

    title = "an embedding option that breaks per-sample gradients"
    severity = Severity.BREAKS_GUARANTEE

    @override
    def find(self, scan: Scan) -> Iterator[Finding]:
        for path, module in scan.modules(nn.Embedding, nn.EmbeddingBag):
            trainable = any(p.requires_grad for p in module.parameters())
            for option, (why, further) in _OPTIONS.items():
                value = getattr(module, option)
                if value in (None, False) or not (trainable or option == "max_norm"):
                    continue
                yield self.refusal(
                    f"{scan.place(path)} has {option}={value}.",
                    f"{why}.",
                    f"build the layer without {option}{further}.",
                    path,
                )

    VALID = (lambda: _model(), lambda: _model(padding_idx=0))
    INVALID = (lambda: _model(max_norm=1.0), lambda: _model(sparse=True), lambda: _model(scale_grad_by_freq=True))


def _model(**options: Any) -> dict[str, Any]:
    return {
        "module": nn.Sequential(nn.Embedding(11, 6, **options), nn.Flatten(), nn.LazyLinear(3)),
        "integers": 11,
    }

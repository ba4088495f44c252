"""Scripts as people have them, with plain Opacus and with dpfix.

``python -m benchmarks.real_scripts [--write]``

Each is a public example or tutorial in small: its model, its collate function, its loss, on invented records of the same form.
It is measured as in :mod:`benchmarks.opacus_comparison`: sensitivity is how far leaving one record out moves the sum that is
released, as a multiple of the clip norm C; the worst of seven C from 0.01 to 10, after a hundred steps of ordinary training. A
script that dpfix refuses is measured again as the refusal says to write it.

The exit status is 1 if dpfix trains one of them with a sensitivity above 1, refuses what was rewritten, or lets one through.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import BertConfig, BertForTokenClassification

import dpfix
from benchmarks.common import tables
from benchmarks.common.libraries import Made
from benchmarks.opacus_comparison import (
    Outcome,
    Setup,
    outcome,
    plain_opacus,
    released_sums,
    through_dpfix,
    with_criterion,
)

RECORDS, NAMES = 16, 48
STEPS = 100
CLIP_NORMS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
MARK = "scripts"


# ------------------------------------------------------------------ Opacus's char-lstm: a name's language from its letters


class NameClassifier(nn.Module):
    """Letters, an LSTM, and a class from what it says at the last place."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(128, 64), nn.LSTM(64, 128, batch_first=True)
        self.out_layer = nn.Linear(128, 18)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(self.lstm(self.embedding(x))[0][:, -1])


def names() -> list[tuple[Tensor, int]]:
    """Names of 4 to 8 letters, and one of 18."""
    lengths = [18 if i == 0 else 4 + i % 5 for i in range(NAMES)]
    return [(torch.randint(97, 123, (length,)), i % 18) for i, length in enumerate(lengths)]


def to_the_longest(items: list[Any]) -> Any:
    return pad_sequence([x for x, _ in items], batch_first=True), torch.tensor([y for _, y in items])


def to_twenty(items: list[Any]) -> Any:
    return torch.stack([F.pad(x, (0, 20 - len(x))) for x, _ in items]), torch.tensor([y for _, y in items])


def char_lstm(collate: Callable[[list[Any]], Any]) -> Setup:
    options = {"batch_size": 8, "collate_fn": collate}
    return Setup(NameClassifier(), names(), lambda m, b: F.cross_entropy(m(b[0]), b[1]), options)


# ------------------------------------------------------------------ Hugging Face's token classification


def sentences() -> list[dict[str, Tensor]]:
    """Sentences of 6 to 12 tokens and one of 30; a label stands at the first token of each word, -100 at the others."""
    out = []
    for i in range(RECORDS):
        length = 30 if i == 0 else 6 + i % 7
        first = torch.ones(length) if i == 0 else torch.rand(length) < 0.3
        names = torch.randint(1, 9, (length,)) * (torch.rand(length) < 0.15)  # most words are no names
        labels = names.masked_fill(~first.bool(), -100)
        labels[0] = 1
        out.append({"input_ids": torch.randint(1, 100, (length,)), "labels": labels})
    return out


def pad_tokens(items: list[Any]) -> Any:
    """What ``DataCollatorForTokenClassification`` does."""
    ids = pad_sequence([item["input_ids"] for item in items], batch_first=True)
    labels = pad_sequence([item["labels"] for item in items], batch_first=True, padding_value=-100)
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}


def token_classifier() -> nn.Module:
    """A small BERT; its embeddings are frozen, as in Opacus's tutorial."""
    size = {
        "vocab_size": 100,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    drop = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = BertForTokenClassification(BertConfig(**size, **drop, num_labels=9)).train()
    model.bert.embeddings.requires_grad_(False)
    return model


def tokens(loss: Callable[[nn.Module, Any], Tensor]) -> Setup:
    return Setup(token_classifier(), sentences(), loss, {"batch_size": 8, "collate_fn": pad_tokens})


ALONE = dpfix.PerSampleLoss(nn.CrossEntropyLoss())


def of_model(model: nn.Module, batch: Any) -> Tensor:
    return model(**batch).loss


def of_every_sentence(model: nn.Module, batch: Any) -> Tensor:
    return ALONE(model(**batch).logits.transpose(1, 2), batch["labels"])


# ------------------------------------------------------------------ MONAI's segmentation with a Dice of the whole batch


def slices(criterion: nn.Module) -> Setup:
    """Slices of scans, of which two have a lesion in them."""
    items = []
    for i in range(RECORDS):
        mask = torch.zeros(1, 32, 32)
        mask[:, 8:14, 8:14] = i < 2
        items.append((torch.randn(1, 32, 32) + mask, mask))
    return with_criterion(UNet(2, 1, 1, (8, 16, 32), (2, 2), norm="instance"), items, criterion)


BATCH_DICE = DiceCELoss(sigmoid=True, batch=True)

Builder = Callable[[], Setup]
SCRIPTS: tuple[tuple[str, Builder, str, Builder], ...] = (
    (
        "Opacus's char-lstm example, which pads names to the longest of the batch",
        lambda: char_lstm(to_the_longest),
        "Padded to 20 letters",
        lambda: char_lstm(to_twenty),
    ),
    (
        "Hugging Face token classification, padded with -100, the model's own loss",
        lambda: tokens(of_model),
        "With `dpfix.PerSampleLoss`",
        lambda: tokens(of_every_sentence),
    ),
    (
        "MONAI `UNet` with `DiceCELoss(batch=True)`, lesions in 2 of 16 slices",
        lambda: slices(BATCH_DICE),
        "With `dpfix.PerSampleLoss`",
        lambda: slices(dpfix.PerSampleLoss(BATCH_DICE)),
    ),
)
"""Name, script, what the refusal says to do, and the script with that done."""


def trained(builder: Builder) -> Builder:
    """The script in the middle of its training; what is refused is told as it is, without a cure."""

    def build() -> Setup:
        setup = builder()
        setup.criterion = None
        optimizer = torch.optim.Adam([p for p in setup.model.parameters() if p.requires_grad], 3e-3)
        for _ in range(STEPS):
            optimizer.zero_grad()
            setup.loss(setup.model, setup.collate(setup.items)).backward()
            optimizer.step()
        setup.model.zero_grad()
        return setup

    return build


def measure(make: Callable[..., Made], setup: Setup) -> Outcome:
    return released_sums(make, setup, CLIP_NORMS)


def run() -> tuple[list[str], bool]:
    """Measure the scripts.

    Returns:
        The lines of the table, and whether dpfix was right everywhere.
    """
    lines, right = tables.head("script", f"plain Opacus {metadata.version('opacus')}", "dpfix"), True
    for name, script, way, mended in SCRIPTS:
        opacus: Outcome = outcome(plain_opacus, trained(script), measure)
        ours = outcome(through_dpfix, trained(script), measure)
        after = outcome(through_dpfix, trained(mended), measure)
        right &= ours.refused and after.right and not after.refused
        silent = "" if opacus.right or opacus.text.startswith("stops") else "**silent** "
        lines.append(tables.row(name, silent + opacus.text, f"{ours.text}. {way}: {after.text}"))
        print(lines[-1], file=sys.stderr)
    return lines, right


def main() -> int:
    """Print the table.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="put the table into README.md")
    given = parser.parse_args()
    lines, right = run()
    print("\n".join(lines))
    if given.write:
        tables.write(Path(__file__).parents[1] / "README.md", lines, mark=MARK)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())

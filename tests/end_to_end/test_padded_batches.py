"""Batches that are padded to their longest sample: the engine that is chosen, and the clipped sum against batches of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import dpfix
from tests.helpers import sgd
from tests.reference import clipped_sum, gradients_one_by_one, relative_error

transformers = pytest.importorskip("transformers")

CLIP = 0.5
EXPECTED = 6
SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
ENCODER = SMALL | {
    "intermediate_size": 32, "max_position_embeddings": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def bert() -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**ENCODER))


def bert_words() -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**ENCODER))


def albert() -> nn.Module:
    config = transformers.AlbertConfig(**ENCODER, embedding_size=8, classifier_dropout_prob=0.0)
    return transformers.AlbertForSequenceClassification(config)


def deberta() -> nn.Module:
    positions = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8}
    config = transformers.DebertaV2Config(**ENCODER, **positions, pooler_hidden_size=16)
    return transformers.DebertaV2ForSequenceClassification(config)


def gpt2() -> nn.Module:
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2, **none)
    return transformers.GPT2LMHeadModel(config)


def opt() -> nn.Module:
    none = {"dropout": 0.0, "layerdrop": 0.0}
    config = transformers.OPTConfig(**SMALL, ffn_dim=32, max_position_embeddings=32, word_embed_proj_dim=16, **none)
    return transformers.OPTForCausalLM(config)


def mixtral() -> nn.Module:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}
    config = transformers.MixtralConfig(**SMALL, intermediate_size=32, max_position_embeddings=32, **experts)
    return transformers.MixtralForCausalLM(config)


class Positions(nn.Module):
    """Positions are looked up for the padded length, and tokens are flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(40, 8), nn.Embedding(16, 8)
        self.inside, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        h = self.words(input_ids) + self.places(torch.arange(input_ids.shape[1]).unsqueeze(0))
        h = torch.tanh(self.inside(h.flatten(0, 1))).view_as(h) * attention_mask.unsqueeze(-1)
        return self.head(h.sum(1) / attention_mask.sum(1, keepdim=True))


def items() -> list[dict[str, Any]]:
    draw, found = torch.Generator().manual_seed(7), []
    for number in range(24):
        length = int(torch.randint(3, 10, (1,), generator=draw))
        ids = torch.randint(5, 40, (length,), generator=draw).tolist()
        found.append({"input_ids": ids, "attention_mask": [1] * length, "label": number % 2})
    return found


def padded(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
    longest = max(len(sample["input_ids"]) for sample in samples)
    rows = {
        k: torch.tensor([s[k] + [0] * (longest - len(s[k])) for s in samples]) for k in ("input_ids", "attention_mask")
    }
    return rows | {"label": torch.tensor([sample["label"] for sample in samples])}


def classes(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return F.cross_entropy(getattr(out, "logits", out), batch["label"])


def words(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    ids, mask = batch["input_ids"], batch["attention_mask"]
    logits = model(input_ids=ids, attention_mask=mask).logits
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none") * mask[:, 1:]
    return (losses.sum(1) / mask[:, 1:].sum(1)).mean()


@pytest.mark.parametrize(
    ("build", "loss"),
    [
        (Positions, classes), (bert, classes), (albert, classes), (deberta, classes), (bert_words, words), (gpt2, words),
        (opt, words), (mixtral, words),
    ],
)  # fmt: skip
def test_padded_batches_keep_the_fast_engine(
    build: Callable[[], nn.Module], loss: Callable[[nn.Module, Any], Tensor]
) -> None:
    torch.manual_seed(0)
    model, fresh, batches = build().train(), build().train(), list[list[Any]]()

    def collate(samples: list[Any]) -> Any:
        batches.append(samples)
        return padded(samples)

    training = dpfix.make_private_safe(
        module=model,
        optimizer=sgd(model, 0.1),
        data_loader=DataLoader(items(), EXPECTED, collate_fn=collate, shuffle=True),  # type: ignore[arg-type]
        noise_multiplier=0.0,
        max_grad_norm=CLIP,
        training_step=loss,
        wrap_model=False,
        cache=False,
    )
    assert training.plan.engine in {"bookkeeping", "vmap"}
    _, optimizer, loader = training
    for batch in loader:
        drawn = batches[-1]
        fresh.load_state_dict(model.state_dict())
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
        if drawn:
            wanted = clipped_sum(gradients_one_by_one(fresh, loss, [padded([sample]) for sample in drawn]), CLIP)
            trained = {n: p.grad * EXPECTED for n, p in model.named_parameters() if n in wanted and p.grad is not None}
            assert relative_error(trained, {n: wanted[n] for n in trained}) < 1e-4

"""Hugging Face's Trainer with a collator that pads, logs, evaluation and checkpoints."""

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from dpfix.integrations import huggingface


def text(number):
    draw = torch.Generator().manual_seed(number)
    ids = torch.randint(1, 50, (4 + number % 5,), generator=draw)
    return {"input_ids": ids, "label": int(ids[0]) % 2}


def collate(texts):
    ids = torch.nn.utils.rnn.pad_sequence([t["input_ids"] for t in texts], batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": torch.tensor([t["label"] for t in texts])}


if __name__ == "__main__":
    size = {
        "vocab_size": 50,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    drop = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    texts = [text(number) for number in range(40)]
    arguments = TrainingArguments(
        "out",
        per_device_train_batch_size=8,
        num_train_epochs=2,
        use_cpu=True,
        report_to=[],
        eval_strategy="epoch",
        logging_steps=1,
        save_steps=1,
    )
    callback = huggingface.PrivateCallback(noise_multiplier=1.0, max_grad_norm=1.0, delta=1e-3)
    Trainer(
        BertForSequenceClassification(BertConfig(**size, **drop)),
        arguments,
        train_dataset=texts,
        eval_dataset=texts[:8],
        data_collator=collate,
        callbacks=[callback],
    ).train()

import tempfile

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from benchmarks.frameworks.data import sentences

torch.manual_seed(0)
config = BertConfig(vocab_size=1000, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
arguments = TrainingArguments(
    tempfile.mkdtemp(),
    per_device_train_batch_size=16,
    num_train_epochs=4,
    learning_rate=1e-3,
    use_cpu=True,
    disable_tqdm=True,
    report_to=[],
    logging_strategy="no",
    save_strategy="no",
)
trainer = Trainer(BertForSequenceClassification(config), arguments, train_dataset=sentences())
# dpfix: from dpfix.integrations import huggingface
# dpfix: private = huggingface.make_private(trainer, noise_multiplier=1.0, max_grad_norm=1.0)
trainer.train()

import torch
from transformers import BertConfig, BertForSequenceClassification

from benchmarks.frameworks.data import sentences

torch.manual_seed(0)
config = BertConfig(vocab_size=1000, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
model = BertForSequenceClassification(config).train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
loader = torch.utils.data.DataLoader(sentences(), batch_size=16, shuffle=True)
# dpfix: import dpfix
# dpfix: private = dpfix.make_private_safe(module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0)
# dpfix: model, optimizer, loader = private
# opacus: from opacus import PrivacyEngine
# opacus: model, optimizer, loader = PrivacyEngine().make_private(module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0)
for epoch in range(4):
    for batch in loader:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

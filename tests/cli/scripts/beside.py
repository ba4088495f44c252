"""Another model is trained on the same records without privacy."""

import torch
from common import parts
from torch import nn

import dpfix

model, optimizer, loader = parts()
other = nn.Linear(6, 3)
plain = torch.optim.SGD(other.parameters(), lr=0.1)
criterion = nn.CrossEntropyLoss()
model, optimizer, loader = dpfix.make_private_safe(
    module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0, criterion=criterion
)
for x, y in loader:
    optimizer.zero_grad()
    criterion(model(x), y).backward()
    optimizer.step()
    plain.zero_grad()
    criterion(other(x), y).backward()
    plain.step()

"""A second optimizer applies the gradients of the private model's last layer."""

import torch
from common import parts
from torch import nn

import dpfix

model, optimizer, loader = parts()
model, optimizer, loader = dpfix.make_private_safe(
    module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0
)
second = torch.optim.SGD(model.parameters(), lr=0.1)
for x, y in loader:
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    second.step()

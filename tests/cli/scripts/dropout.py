"""A right script whose loop draws random numbers."""

from common import parts
from torch import nn

import dpfix

model, optimizer, loader = parts()
model.insert(2, nn.Dropout(0.5))
criterion = nn.CrossEntropyLoss()
private = dpfix.make_private_safe(
    module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=0.1, criterion=criterion
)
model, optimizer, loader = private
for x, y in loader:
    optimizer.zero_grad()
    criterion(model(x), y).backward()
    optimizer.step()

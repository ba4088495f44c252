"""The loss is centred over the batch."""

from common import parts

import dpfix

model, optimizer, loader = parts()
model, optimizer, loader = dpfix.make_private_safe(
    module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0
)
for x, y in loader:
    optimizer.zero_grad()
    out = model(x)
    loss = ((out - out.mean(0)) ** 2).mean()
    loss.backward()
    optimizer.step()

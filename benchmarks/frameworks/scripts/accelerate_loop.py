import torch
from accelerate import Accelerator
from torch import nn

from benchmarks.frameworks.data import images

torch.manual_seed(0)
accelerator = Accelerator(cpu=True)
model = nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
loader = torch.utils.data.DataLoader(images(), batch_size=64, shuffle=True)
# dpfix: import dpfix
# dpfix: private = dpfix.make_private_safe(module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0)
# dpfix: model, optimizer, loader = private
# opacus: from opacus import PrivacyEngine
# opacus: model, optimizer, loader = PrivacyEngine().make_private(module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for epoch in range(4):
    for x, y in loader:
        optimizer.zero_grad()
        accelerator.backward(nn.functional.cross_entropy(model(x), y))
        optimizer.step()

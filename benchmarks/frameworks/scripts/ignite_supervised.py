import torch
from ignite.engine import create_supervised_trainer
from torch import nn

from benchmarks.frameworks.data import images

torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(1, 16, 3), nn.GroupNorm(4, 16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 26 * 26, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
loader = torch.utils.data.DataLoader(images(), batch_size=64, shuffle=True)
# dpfix: import dpfix
# dpfix: private = dpfix.make_private_safe(module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0)
# dpfix: model, optimizer, loader = private
# opacus: from opacus import PrivacyEngine
# opacus: model, optimizer, loader = PrivacyEngine().make_private(module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0)
trainer = create_supervised_trainer(model, optimizer, nn.functional.cross_entropy)
# dpfix: from dpfix.integrations.monai import PrivacyHandler
# dpfix: PrivacyHandler(private).attach(trainer)
trainer.run(loader, max_epochs=4)

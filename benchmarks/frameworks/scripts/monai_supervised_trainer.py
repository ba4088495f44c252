import torch
from monai.engines import SupervisedTrainer
from monai.losses import DiceLoss
from monai.networks.nets import UNet

from benchmarks.frameworks.data import volumes

torch.manual_seed(0)
model = UNet(2, 1, 1, channels=(8, 16), strides=(2,), norm="instance")
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
loader = torch.utils.data.DataLoader(volumes(), batch_size=8, shuffle=True)
loss = DiceLoss(sigmoid=True)
# dpfix: import dpfix
# dpfix: private = dpfix.make_private_safe(module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0, criterion=loss)
# dpfix: model, optimizer, loader = private
# opacus: from opacus import PrivacyEngine
# opacus: model, optimizer, loader = PrivacyEngine().make_private(module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0)
trainer = SupervisedTrainer(
    device=torch.device("cpu"),
    max_epochs=4,
    train_data_loader=loader,
    network=model,
    optimizer=optimizer,
    loss_function=loss,
)
# dpfix: from dpfix.integrations.monai import PrivacyHandler
# dpfix: PrivacyHandler(private).attach(trainer)
trainer.run()

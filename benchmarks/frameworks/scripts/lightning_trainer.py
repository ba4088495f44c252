import lightning
import torch
from torch import nn

from benchmarks.frameworks.data import images


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        # opacus: from opacus import PrivacyEngine
        # opacus: self.trainer.fit_loop.setup_data()
        # opacus: model, optimizer, _ = PrivacyEngine().make_private(module=self, optimizer=optimizer, data_loader=self.trainer.train_dataloader, noise_multiplier=1.0, max_grad_norm=1.0)
        # opacus: self.private = {"model": model}
        return optimizer


torch.manual_seed(0)
loader = torch.utils.data.DataLoader(images(), batch_size=64, shuffle=True)
callbacks = []
# opacus: from opacus.data_loader import DPDataLoader
# opacus: loader = DPDataLoader.from_data_loader(loader)
# dpfix: from dpfix.integrations.lightning import PrivateCallback
# dpfix: callbacks.append(private := PrivateCallback(noise_multiplier=1.0, max_grad_norm=1.0))
trainer = lightning.Trainer(
    max_epochs=4,
    accelerator="cpu",
    devices=1,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    callbacks=callbacks,
)
trainer.fit(Classifier(), loader)
# dpfix: private = private.private

"""Opacus's way in Lightning: configure_optimizers makes the module private, and the module holds the wrapper."""

import lightning
from common import points
from opacus import PrivacyEngine
from opacus.data_loader import DPDataLoader
from torch import nn, optim
from torch.utils.data import DataLoader


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        self.engine = PrivacyEngine()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def configure_optimizers(self):
        optimizer = optim.SGD(self.parameters(), lr=0.1)
        self.trainer.fit_loop.setup_data()
        model, optimizer, _ = self.engine.make_private(
            module=self,
            optimizer=optimizer,
            data_loader=self.trainer.train_dataloader,
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )
        self.dp = {"model": model}
        return optimizer


if __name__ == "__main__":
    loader = DPDataLoader.from_data_loader(DataLoader(points(), batch_size=10))
    lightning.Trainer(max_epochs=3, accelerator="cpu", devices=1).fit(Classifier(), loader)

"""A training in Lightning's Trainer, with its logs and checkpoints in the working folder."""

import lightning
from common import points
from torch import nn, optim
from torch.utils.data import DataLoader, random_split

from dpfix.integrations.lightning import PrivateCallback


class Points(lightning.LightningDataModule):
    def setup(self, stage=None):
        self.train, self.val = random_split(points(), [50, 10])

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=10, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=10)


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        optimizer = optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [optim.lr_scheduler.StepLR(optimizer, 1)]


if __name__ == "__main__":
    lightning.seed_everything(3)
    private = PrivateCallback(noise_multiplier=1.0, max_grad_norm=1.0, delta=1e-3)
    trainer = lightning.Trainer(max_epochs=3, callbacks=[private], accelerator="cpu", devices=1, log_every_n_steps=1)
    trainer.fit(Classifier(), datamodule=Points())

"""A data set that moves what it reads by the records that it has read before."""

import torch
from common import parts, points
from torch import nn
from torch.utils.data import Dataset

import dpfix


class Moved(Dataset):
    def __init__(self):
        self.points, self.total = points(), torch.zeros(6)

    def __len__(self):
        return len(self.points)

    def __getitem__(self, index):
        x, y = self.points[index]
        self.total = self.total + x
        return x - self.total, y


model, optimizer, loader = parts(Moved())
criterion = nn.CrossEntropyLoss()
model, optimizer, loader = dpfix.make_private_safe(
    module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=0.1, criterion=criterion
)
for x, y in loader:
    optimizer.zero_grad()
    criterion(model(x), y).backward()
    optimizer.step()
